#!/usr/bin/env python
"""Time of one decode step at real shapes without real weights: the trio, and the base alone.

    python scripts/bench_step.py --json benchmarks/results/step.json            # one GPU
    python scripts/bench_step.py --systems proxy sampler_graphs fused_head      # what options gain
    python scripts/bench_step.py --systems proxy adapters --batch 8            # experts as adapters
    python scripts/bench_step.py --smoke --json /tmp/step.json                  # a CPU, tiny shapes

Models are a config.json each, weights are vLLM's dummies, nothing is fetched. A step is the
difference of two runs of one batch that differ in length only, so that prefill and start-up cancel.
Each system has a process of its own. Before that, its engine with a random 135M-class trio must
choose the Transformers models' tokens; otherwise nothing is reported. Batches that the KV cache
does not hold are left out.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from adapter_files import make_adapter, merge
from bench_common import (
    ChildProcess,
    compare_with_loop,
    device_name,
    engine,
    gpu_key,
    greedy,
    percentiles,
    provenance,
    random_prompts,
    result_file,
    script_argv,
    write_result,
)

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
    "rms_norm_eps": 1e-5, "bos_token_id": 0, "eos_token_id": 1, "dtype": "bfloat16",
    "attention_bias": False, "mlp_bias": False,
}  # fmt: skip
SHAPES = {
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
           "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
           "vocab_size": 128256, "tie_word_embeddings": False},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
           "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
           "vocab_size": 128256, "tie_word_embeddings": True},
    "13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40,
            "num_attention_heads": 40, "num_key_value_heads": 40, "head_dim": 128,
            "vocab_size": 32000, "tie_word_embeddings": False},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
           "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128,
           "vocab_size": 32000, "tie_word_embeddings": False},
    "135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
             "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64,
             "vocab_size": 49152, "tie_word_embeddings": True},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
             "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32,
             "vocab_size": 509, "tie_word_embeddings": True},
}  # fmt: skip
CHECK_TOKENS = 16
# Adapters that a batch mixes, in the place of an expert of its own.
ADAPTERS = {"enable_lora": True, "max_loras": 2}
# What is timed: arguments of `ProxyLLM`, or None for the base alone.
SYSTEMS: dict[str, dict | None] = {
    "proxy": {},
    "sampler_graphs": {"sampler_cuda_graphs": True},
    "fused_head": {"fused_head_max_batch": 1 << 20},
    "adapters": ADAPTERS,
    "base": None,
}


def write_config(root: Path, name: str, role: str = "") -> str:
    """A folder that holds the config.json of `SHAPES[name]`, and nothing else."""
    folder = root / role / name
    folder.mkdir(parents=True, exist_ok=True)
    config = {**LLAMA, **SHAPES[name], "max_position_embeddings": 8192}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def write_trio(root: Path, shapes: list[str]) -> list[str]:
    """Folders of base, expert and antiexpert; one each, since what is the base twice runs once."""
    roles = zip(("base", "expert", "antiexpert"), (*shapes, shapes[1]))
    return [write_config(root, shape, role) for role, shape in roles]


def write_models(root: Path, name: str) -> list[str]:
    """Three random models of one shape, drawn wide, so that their choices differ clearly."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folders = []
    for seed, role in enumerate(("base", "expert", "antiexpert")):
        torch.manual_seed(seed)
        config = LlamaConfig(
            **SHAPES[name], max_position_embeddings=2048, initializer_range=0.05,
            bos_token_id=0, eos_token_id=1,
        )  # fmt: skip
        folder = root / f"{name}-{role}"
        LlamaForCausalLM(config).save_pretrained(folder)
        folders.append(str(folder))
    return folders


def adapters_of(model: str) -> dict[str, str]:
    """Adapters of rank 16 of a small model, written beside it."""
    paths = {}
    for number in range(ADAPTERS["max_loras"]):
        path = Path(f"{model}-adapter-{number}")
        if not path.exists():
            make_adapter(path, model, seed=number, rank=16, scale=0.5)
        paths[path.name] = str(path)
    return paths


def start_engine(system: str, models: list[str], args: argparse.Namespace, **kwargs):
    """An engine of `SYSTEMS`."""
    options = SYSTEMS[system]
    members = models[:1] if options is None else models
    if options is ADAPTERS:
        options = {**options, "lora_modules": adapters_of(models[2])}
        members = [models[0], "", models[2]]
    return engine(members, **(options or {}), **kwargs, **args.engine_args)


def measure(system: str, models: list[str], args: argparse.Namespace) -> dict:
    """Step times in ms of each batch: differences between a long and a short run."""
    rows = max(args.batch)
    short, whole = args.tokens // 4, args.tokens
    start = time.perf_counter()
    llm = start_engine(
        system, models, args, dtype=args.dtype, load_format="dummy", max_num_seqs=rows,
        max_model_len=args.context + whole, enable_prefix_caching=True,
        compilation_config={"cudagraph_capture_sizes": sorted(args.batch)},
    )  # fmt: skip
    result: dict = {"start_s": round(time.perf_counter() - start, 2), "step_ms": {}}
    vocab = SHAPES[args.shapes[0]]["vocab_size"]
    prompts = random_prompts(rows, args.context, vocab)

    def timed(batch: int, tokens: int) -> float:
        begun = time.perf_counter()
        greedy(llm, prompts[:batch], tokens)
        return time.perf_counter() - begun

    cache = llm.llm_engine.vllm_config.cache_config
    result["kv_tokens"] = cache.num_gpu_blocks * cache.block_size
    for batch in args.batch:
        if batch * (args.context + whole) > result["kv_tokens"]:
            continue  # requests would wait for each other
        timed(batch, short)  # fills the prefix cache, so that later runs hardly prefill
        pairs = [(timed(batch, short), timed(batch, whole)) for _ in range(args.repeats)]
        result["step_ms"][str(batch)] = [1e3 * (b - a) / (whole - short) for a, b in pairs]
    result["cuda_graphs"] = cuda_graphs(llm)
    return result


def cuda_graphs(llm) -> str:
    """The mode that vLLM settled on; NONE on a CPU or with enforce_eager."""
    mode = llm.llm_engine.vllm_config.compilation_config.cudagraph_mode
    return getattr(mode, "name", str(mode))


def check(system: str, models: list[str], args: argparse.Namespace) -> dict:
    """The engine's greedy tokens at four alphas against the Transformers models' choices."""
    import torch
    from reference_loop import Trio

    vocab = SHAPES[args.check_shape]["vocab_size"]
    alphas = [1.0, 0.0, 0.5, -0.5]
    prompts = random_prompts(len(alphas), 24, vocab)
    llm = start_engine(
        system, models, args, dtype=args.check_dtype, max_num_seqs=4, max_model_len=128
    )
    outputs = greedy(llm, prompts, CHECK_TOKENS, alphas)
    tokens = [list(o.outputs[0].token_ids) for o in outputs]
    experts = [models[1]]
    if SYSTEMS[system] is ADAPTERS:
        paths = adapters_of(models[2]).values()
        experts = [merge(Path(f"{path}-merged"), models[2], path) for path in paths]
    found = []
    for first, expert in enumerate(experts):
        trio = Trio.load(models[0], expert, models[2], torch.float32)
        own = [rows[first :: len(experts)] for rows in (prompts, tokens, alphas)]
        found.append(compare_with_loop(trio, own[0], own[1], args.check_dtype, own[2]))
    worst = max(found, key=lambda result: result["gap"])
    counts = {name: sum(result[name] for result in found) for name in ("tokens", "exact")}
    return {**worst, **counts, "passed": all(result["passed"] for result in found)}


def rows_of(measured: dict[str, dict], args: argparse.Namespace) -> list[dict]:
    """One row a batch: steps of every system, its floor, and its share of the base alone."""
    from proxy_vllm.plan.gpus import find_gpu
    from proxy_vllm.plan.model_size import DTYPE_BYTES, model_shape
    from proxy_vllm.plan.roofline import step_floor

    key = args.gpu or gpu_key(device_name())
    shapes = [model_shape({**LLAMA, **SHAPES[s]}, s) for s in args.shapes]
    context = args.context + (args.tokens + args.tokens // 4) // 2

    def floor_of(system: str, batch: int) -> float | None:
        members = shapes[:1] if SYSTEMS[system] is None else shapes
        return key and step_floor(
            members, find_gpu(key), batch=batch, context=context,
            dtype_bytes=DTYPE_BYTES[args.dtype],
        ).step_ms  # fmt: skip

    rows = []
    for batch in args.batch:
        row: dict = {"batch": batch, "context": context}
        for system, result in measured.items():
            times = result["step_ms"].get(str(batch))
            if times is None:
                row[system] = {"left_out": f"the KV cache holds {result['kv_tokens']} tokens"}
                continue
            step, floor = percentiles(times, (20, 50, 80)), floor_of(system, batch)
            row[system] = {
                "step_ms": step,
                "tokens_per_s": round(1e3 * batch / step["p50"], 2),
                "floor_ms": floor and round(floor, 4),
                "share_of_floor": floor and round(floor / step["p50"], 4),
            }
        base = row.get("base", {}).get("step_ms")
        for system in measured:
            if base and system != "base" and "step_ms" in row[system]:
                row.setdefault("ratio", {})[system] = round(
                    base["p50"] / row[system]["step_ms"]["p50"], 4
                )
        floors = [floor_of(system, batch) for system in ("base", "proxy")]
        row["floor_ratio"] = round(floors[0] / floors[1], 4) if key else None
        rows.append(row)
    return rows


def decisions(rows: list[dict]) -> dict[str, str]:
    """What a measurement of `proxy` beside an option says about the option's default.

    A batch is a gain where even a slow step (p80) with the option is faster than a fast one (p20)
    without it, and a loss the other way round. The rule is that of docs/serving.md.
    """

    def verdicts(system: str) -> list[tuple[int, int]]:
        found = []
        for row in rows:
            times = [row.get(name, {}).get("step_ms") for name in ("proxy", system)]
            if None not in times:
                plain, option = times
                gain = option["p80"] < plain["p20"]
                found.append((row["batch"], gain - (option["p20"] > plain["p80"])))
        return sorted(found)

    said = {}
    graphs = verdicts("sampler_graphs")
    if graphs:
        gains = [batch for batch, verdict in graphs if verdict > 0]
        losses = [batch for batch, verdict in graphs if verdict < 0]
        said["--sampler-cuda-graphs"] = (
            f"on: faster at batch {gains}, slower at none"
            if gains and not losses
            else f"off: faster at batch {gains}, slower at {losses}"
        )
    heads = verdicts("fused_head")
    if heads:
        most = 0
        for batch, verdict in heads:
            if verdict <= 0:
                break
            most = batch
        said["--fused-head-max-batch"] = (
            f"{most}: faster at every measured batch up to it"
            if most
            else f"0: no gain at batch {heads[0][0]}"
        )
    return said


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shapes", nargs=2, choices=list(SHAPES), default=["8b", "1b"], metavar=("BASE", "SMALL"))
    add("--systems", nargs="+", choices=list(SYSTEMS), default=["proxy", "base"])
    add("--batch", type=int, nargs="+", default=[1, 8, 64, 256])
    add("--context", type=int, default=1024, help="tokens of each prompt")
    add("--tokens", type=int, default=64, help="tokens of a long run; a short one has a quarter")
    add("--repeats", type=int, default=5)
    add("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    add("--check-shape", choices=list(SHAPES), default="135m")
    add("--check-dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    add("--gpu", help="name in proxy_vllm.plan.gpus.GPUS, where the device's own is not known")
    add("--engine-args", type=json.loads, default={}, metavar="JSON", help="for every engine")
    add("--smoke", action="store_true", help="tiny shapes, for a CPU")
    add("--json", type=result_file, help="write the result here")
    args = parser.parse_args()
    args.environment = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    if args.smoke:
        args.shapes, args.batch, args.context, args.tokens = ["tiny", "tiny"], [1, 4], 32, 16
        args.check_shape, args.check_dtype, args.repeats = "tiny", "float32", 2
        args.engine_args = {
            "enforce_eager": True, "kv_cache_memory_bytes": 32 << 20, "block_size": 32,
            **args.engine_args,
        }  # fmt: skip
        args.environment |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1"}
    if args.tokens < 4 or min(args.batch) < 1 or args.repeats < 1:
        parser.error("--tokens from 4, --batch and --repeats from 1")
    return args


def main() -> None:
    args = parse()
    os.environ.update(args.environment)
    begun = time.monotonic()

    def run(function: Callable[..., dict], system: str, models: list[str]) -> dict:
        with ChildProcess() as child:
            return child(function, system, models, args)

    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        trio = write_models(root, args.check_shape)
        checked = {}
        for system in args.systems:
            if SYSTEMS[system] is None:
                continue
            checked[system] = run(check, system, trio)
            if not checked[system]["passed"]:
                sys.exit(
                    f"bench_step.py: error: {system}: tokens differ from Transformers' choices:"
                    f" {checked[system]}"
                )
        models = write_trio(root, args.shapes)
        measured = {s: run(measure, s, models) for s in args.systems}
    rows = rows_of(measured, args)
    result = {
        **provenance(script_argv("bench_step.py")),
        "shapes": {"base": args.shapes[0], "expert": args.shapes[1], "antiexpert": args.shapes[1]},
        "dtype": args.dtype,
        "correctness": {"shape": args.check_shape, "dtype": args.check_dtype, **checked},
        "engines": {
            k: {name: v[name] for name in ("start_s", "cuda_graphs", "kv_tokens")}
            for k, v in measured.items()
        },
        "took_s": round(time.monotonic() - begun, 1),
        "rows": rows,
        "decisions": decisions(rows),
    }
    print(json.dumps(result, indent=2))
    for option, decision in result["decisions"].items():
        print(f"decision: {option} {decision}")
    write_result(args.json, result)


if __name__ == "__main__":
    main()
