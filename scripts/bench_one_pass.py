#!/usr/bin/env python
"""What one pass of a small model over twice the rows would gain over two passes, one a member.

    python scripts/bench_one_pass.py --json benchmarks/results/one_pass.json          # one GPU
    python scripts/bench_one_pass.py --small 135m box --batch 1 8 32 --context 128    # a CPU
    python scripts/bench_one_pass.py --smoke --json /tmp/one_pass.json                # tiny shapes

Expert and antiexpert may have one copy of their weights (docs/adapters.md), of which every step
makes two passes, B rows each. What one pass over 2 B rows saves is measured on the small model
alone in plain vLLM: twice a decode step of B requests beside one of 2 B requests. Such steps hold
more than a pass does: scheduling, sampling and the token tables, which a composite's step has once
anyway. So the same model with one layer is measured too. Between the two lies the truth:

    at most     2 step(B) - step(2 B)
    at least    the same of the layers alone, L / (L - 1) * (step - step of the model with 1 layer)

Beside it stands the floor, by `proxy_vllm.plan.roofline`: small weights read once, not twice.
Models are a config.json each, weights are vLLM's dummies, and a step is the difference of two runs
that differ in length only. Each engine has a process of its own, `--rounds` times over in turn.
Before that, rows of a batch of 2 B must get the tokens that they get in batches of B, and both
those that Transformers chooses; otherwise nothing is reported.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

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
from bench_step import CHECK_TOKENS, LLAMA, SHAPES, measure, write_config, write_models

from proxy_vllm.demo import model_path
from proxy_vllm.plan.gpus import Gpu, find_gpu
from proxy_vllm.plan.model_size import DTYPE_BYTES, ModelShape, model_shape
from proxy_vllm.plan.roofline import step_floor

CHECK_ROWS = 4
KV_BYTES = 512 << 20  # on a CPU
_BOX = json.loads((model_path("antiexpert") / "config.json").read_text())
SHAPES["box"] = {name: _BOX[name] for name in SHAPES["tiny"]}  # of the trio in the box
SHAPES["70b"] = {
    **SHAPES["8b"], "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
    "num_attention_heads": 64,
}  # fmt: skip
# Whose floors are told: base, small model, GPU, how many hold them. Without a base both passes are
# the large model's own, as with `--method cfg`.
FLOORS = [
    ("8b", "1b", "h100-sxm", 1),
    ("8b", "1b", "h200", 1),
    ("70b", "8b", "h100-sxm", 4),
    ("70b", "8b", "h200", 2),
    (None, "8b", "h100-sxm", 1),
    (None, "8b", "h200", 1),
]


def one_layer(name: str) -> str:
    """The name in `SHAPES` of a model with one layer, otherwise like another."""
    SHAPES[f"{name}-1-layer"] = {**SHAPES[name], "num_hidden_layers": 1}
    return f"{name}-1-layer"


def steps(name: str, root: Path, args: argparse.Namespace) -> dict[int, float]:
    """Median decode step in ms of the model alone, by the number of rows."""
    rows = sorted({n for batch in args.batch for n in (batch, 2 * batch)})
    one_layer(name.removesuffix("-1-layer"))
    own = argparse.Namespace(**{**vars(args), "batch": rows, "shapes": [name]})
    found = measure("base", [write_config(root, name)], own)["step_ms"]
    return {int(n): statistics.median(times) for n, times in found.items()}


def check(model: str, args: argparse.Namespace) -> dict:
    """Tokens of two batches beside those of one of twice the rows, and Transformers' choices."""
    import torch
    from reference_loop import Trio

    prompts = random_prompts(2 * CHECK_ROWS, 24, SHAPES[args.check_shape]["vocab_size"])
    llm = engine(
        [model], dtype=args.check_dtype, max_num_seqs=len(prompts), max_model_len=128,
        enable_prefix_caching=False, **args.engine_args,
    )  # fmt: skip

    def answers(asked: list[list[int]]) -> list[list[int]]:
        return [list(o.outputs[0].token_ids) for o in greedy(llm, asked, CHECK_TOKENS)]

    apart = answers(prompts[:CHECK_ROWS]) + answers(prompts[CHECK_ROWS:])
    together = answers(prompts)
    # At alpha 0 a trio's choices are those of its base.
    trio = Trio.load(model, model, model, torch.float32)
    found = [
        compare_with_loop(trio, prompts, tokens, args.check_dtype, [0.0] * len(prompts))
        for tokens in (apart, together)
    ]
    equal = sum(a == b for a, b in zip(apart, together, strict=True))
    # Below 32 bits, batches of another size may round a near tie the other way.
    passed = all(each["passed"] for each in found)
    passed &= equal == len(prompts) or args.check_dtype != "float32"
    return {"rows": len(prompts), "equal_rows": equal, "of_transformers": found, "passed": passed}


def shape_of(name: str) -> ModelShape:
    return model_shape({**LLAMA, **SHAPES[name], "max_position_embeddings": 8192}, name)


def floors(
    base: str | None, small: str, gpu: Gpu, batch: int, context: int, dtype: str, tp: int = 1
) -> dict:
    """Least time of a step of a trio (of its small models alone without a base), either way."""
    options = {"context": context, "tp": tp, "dtype_bytes": DTYPE_BYTES[dtype]}

    def floor(name: str, rows: int) -> float:
        return step_floor([shape_of(name)], gpu, batch=rows, **options).step_ms

    rest = floor(base, batch) if base else 0.0
    two, one = rest + 2 * floor(small, batch), rest + floor(small, 2 * batch)
    return {
        "two_passes_ms": round(two, 4),
        "one_pass_ms": round(one, 4),
        "gain_ms": round(two - one, 4),
        "gain": round(1 - one / two, 4),
    }


def table_of_floors(batches: list[int], context: int) -> list[dict]:
    """What reading shared weights once gains of a whole step, by arithmetic."""
    return [
        {"base": base, "small": small, "gpu": gpu, "gpus": tp, "batch": batch, "context": context}
        | floors(base, small, find_gpu(gpu), batch, context, "bfloat16", tp)
        for base, small, gpu, tp in FLOORS
        for batch in batches
    ]


def gains(name: str, rounds: list[dict[str, dict[int, float]]], args: argparse.Namespace) -> list:
    """One row a batch: both steps, and what one pass gains at least and at most."""
    layers = SHAPES[name]["num_hidden_layers"]
    key = args.gpu or gpu_key(device_name())
    context = args.context + (args.tokens + args.tokens // 4) // 2
    made = []
    for batch in args.batch:
        row: dict = {"small": name, "batch": batch, "context": context}
        both = [(r["whole"], r["one_layer"]) for r in rounds]
        if any(2 * batch not in each for pair in both for each in pair):
            made.append(row | {"left_out": "the KV cache does not hold twice the batch"})
            continue
        for label, rows in (("step_ms", batch), ("step_of_twice_the_rows_ms", 2 * batch)):
            row[label] = percentiles([whole[rows] for whole, _ in both], (20, 50, 80))

        def passes(steps: list[dict[int, float]], batch: int = batch) -> list[tuple[float, float]]:
            return [(2 * each[batch], each[2 * batch]) for each in steps]

        alone = [
            {n: (whole[n] - one[n]) * layers / (layers - 1) for n in (batch, 2 * batch)}
            for whole, one in both
        ]
        for label, pairs in (
            ("at_most", passes([whole for whole, _ in both])),
            ("at_least", passes(alone)),
        ):
            row[label] = {
                "gain_ms": percentiles([two - one for two, one in pairs], (20, 50, 80)),
                "one_over_two": percentiles([one / two for two, one in pairs], (20, 50, 80)),
            }
        row["floor"] = key and floors(None, name, find_gpu(key), batch, context, args.dtype)
        made.append(row)
    return made


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--small", nargs="+", choices=list(SHAPES), default=["1b"], metavar="SHAPE")
    add("--batch", type=int, nargs="+", default=[1, 8, 64, 256])
    add("--context", type=int, default=1024, help="tokens of each prompt")
    add("--tokens", type=int, default=64, help="tokens of a long run; a short one has a quarter")
    add("--repeats", type=int, default=5, help="in an engine")
    add("--rounds", type=int, default=3, help="of engines")
    add("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    add("--check-shape", choices=list(SHAPES), default="135m")
    add("--check-dtype", choices=["bfloat16", "float16", "float32"])
    add("--gpu", help="name in proxy_vllm.plan.gpus.GPUS, where the device's own is not known")
    add("--engine-args", type=json.loads, default={}, metavar="JSON", help="for every engine")
    add("--smoke", action="store_true", help="tiny shapes, for a CPU")
    add("--json", type=result_file, help="write the result here")
    args = parser.parse_args()
    cpu = device_name().startswith("CPU")
    args.environment = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    if args.smoke:
        args.small, args.batch, args.context, args.tokens = ["tiny"], [1, 4], 32, 16
        args.check_shape, args.repeats, args.rounds = "tiny", 2, 1
        args.engine_args = {"enforce_eager": True, "block_size": 32, **args.engine_args}
        args.environment |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1"}
    if cpu:
        args.engine_args = {"kv_cache_memory_bytes": KV_BYTES, **args.engine_args}
    args.check_dtype = args.check_dtype or ("float32" if cpu else "bfloat16")
    if args.tokens < 4 or min(args.batch) < 1 or min(args.repeats, args.rounds) < 1:
        parser.error("--tokens from 4; --batch, --repeats and --rounds from 1")
    if single := [name for name in args.small if SHAPES[name]["num_hidden_layers"] < 2]:
        parser.error(f"--small {single[0]}: a model of at least 2 layers")
    return args


def main() -> None:
    args = parse()
    os.environ.update(args.environment)
    begun = time.monotonic()

    def run(function: Callable[..., dict], *given: object) -> dict:
        with ChildProcess() as child:
            return child(function, *given, args)

    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        checked = run(check, write_models(root, args.check_shape)[0])
        if not checked["passed"]:
            sys.exit(f"bench_one_pass.py: error: tokens differ between batches: {checked}")
        rows = []
        for small in args.small:
            names = {"whole": small, "one_layer": one_layer(small)}
            rounds = []
            for number in range(args.rounds):
                rounds.append({what: run(steps, each, root) for what, each in names.items()})
                print(f"{small}, round {number + 1}/{args.rounds}: {rounds[-1]}", file=sys.stderr)
            rows += gains(small, rounds, args)
    result = {
        **provenance(script_argv("bench_one_pass.py")),
        "dtype": args.dtype,
        "correctness": {"shape": args.check_shape, "dtype": args.check_dtype, **checked},
        "took_s": round(time.monotonic() - begun, 1),
        "rows": rows,
        "floors": table_of_floors([1, 8, 64, 256], 1024),
    }
    print(json.dumps(result, indent=2))
    for row in rows:
        if "left_out" not in row:
            least, most = (row[bound]["gain_ms"]["p50"] for bound in ("at_least", "at_most"))
            print(
                f"{row['small']}, batch {row['batch']}: one pass saves {least:.3f} to {most:.3f} ms"
                f" of two passes of {row['step_ms']['p50']:.3f} ms"
            )
    write_result(args.json, result)


if __name__ == "__main__":
    main()
