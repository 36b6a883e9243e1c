#!/usr/bin/env python
"""This tree beside an older commit: step, start-up and memory of one trio, in pairs taken in turns.

    python scripts/bench_pairs.py 1bc7be1 --json benchmarks/results/pairs.json     # one GPU
    python scripts/bench_pairs.py 1bc7be1 --shapes 135m 135m --dtype float32 \\
        --engine-args '{"kv_cache_memory_bytes": 1073741824}'                      # a CPU
    python scripts/bench_pairs.py HEAD --smoke                                     # tiny shapes

Every engine has a process of its own, and weights are vLLM's dummies. Of each pair the other tree
goes first the next time, so that a machine that warms up or slows down favours neither. Before
that, both trees must choose the same tokens with a random trio; otherwise nothing is reported.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

TREES = ("old", "new")
# A difference counts where every pair shows it, of at least so many, and half of them this much.
FEWEST, LEAST = 3, 0.02


def measure(task: dict) -> dict:
    """In a process that imports `proxy_vllm` from the tree under test: one engine."""
    start = time.perf_counter()
    import proxy_vllm

    found = Path(proxy_vllm.__file__).resolve().parent.parent
    assert found == Path(task["tree"]).resolve(), f"proxy_vllm is imported from {found}"
    import torch
    from vllm import SamplingParams

    base, expert, antiexpert = task["models"]
    llm = proxy_vllm.ProxyLLM(
        base, expert=expert, antiexpert=antiexpert, skip_tokenizer_init=True, **task["engine"]
    )
    cache = llm.llm_engine.vllm_config.cache_config
    result: dict = {
        "start_s": time.perf_counter() - start,
        "kv_tokens": cache.num_gpu_blocks * cache.block_size,
        "step_ms": {},
    }
    generator = torch.Generator().manual_seed(7)
    shape = (max(task["batch"]), task["context"])
    prompts = torch.randint(10, task["vocab"], shape, generator=generator).tolist()

    def run(batch: int, tokens: int) -> list:
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        asked = [{"prompt_token_ids": prompt} for prompt in prompts[:batch]]
        return llm.generate(asked, params, use_tqdm=False)

    def timed(batch: int, tokens: int) -> float:
        begun = time.perf_counter()
        run(batch, tokens)
        return time.perf_counter() - begun

    whole = task["tokens"]
    short = whole // 4
    if task["repeats"] == 0:
        outputs = run(max(task["batch"]), whole)
        result["answers"] = [list(output.outputs[0].token_ids) for output in outputs]
    for batch in task["batch"] if task["repeats"] else ():
        if batch * (task["context"] + whole) > result["kv_tokens"]:
            continue  # requests would wait for each other
        timed(batch, short)  # fills the prefix cache, so that later runs hardly prefill
        pairs = [(timed(batch, short), timed(batch, whole)) for _ in range(task["repeats"])]
        result["step_ms"][str(batch)] = median(1e3 * (b - a) / (whole - short) for a, b in pairs)
    return result


def run_in(tree: Path, task: dict) -> dict:
    """`measure` in a fresh process over a tree, and the most memory that it took."""
    from bench_common import PeakMemory

    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder, "result.json"), Path(folder, "log")
        task = {**task, "tree": str(tree), "out": str(out)}
        with log.open("w") as file:
            child = subprocess.Popen(
                [sys.executable, os.path.abspath(__file__), "--task", json.dumps(task)],
                # vLLM looks at models in a process of its own, which searches its folder first.
                cwd=tree,
                env={**os.environ, "PYTHONPATH": str(tree)},
                stdout=file,
                stderr=file,
            )
            memory = PeakMemory([child.pid], task["gpus"])
            failed = child.wait()
            peak = memory.stop()
        if failed:
            sys.exit(
                f"bench_pairs.py: error: an engine of {tree} failed:\n{log.read_text()[-4000:]}"
            )
        return {**json.loads(out.read_text()), "peak_mib": peak / (1 << 20)}


def compared(old: list[float], new: list[float]) -> dict:
    """Medians of both, and what the ratios of the pairs say."""
    ratios = sorted(b / a for a, b in zip(old, new, strict=True))
    middle = median(ratios)
    if len(ratios) < FEWEST:
        said = f"unknown: fewer than {FEWEST} pairs"
    elif ratios[0] > 1 and middle > 1 + LEAST:
        said = "more"
    elif ratios[-1] < 1 and middle < 1 - LEAST:
        said = "less"
    else:
        said = "no difference"
    return {
        "old": round(median(old), 4),
        "new": round(median(new), 4),
        "ratio": round(middle, 4),
        "ratios": [round(ratio, 4) for ratio in ratios],
        "new_takes": said,
    }


def summary(pairs: list[dict[str, dict]], batches: list[int]) -> dict[str, dict]:
    """Each figure that every engine gave, compared over the pairs."""
    figures = {
        name: [[pair[tree][name] for pair in pairs] for tree in TREES]
        for name in ("start_s", "peak_mib", "kv_tokens")
    }
    for batch in map(str, batches):
        steps = [[pair[tree]["step_ms"].get(batch) for pair in pairs] for tree in TREES]
        if None not in steps[0] + steps[1]:
            figures[f"step_ms at batch {batch}"] = steps
    return {name: compared(*values) for name, values in figures.items()}


def unpack(commit: str, folder: Path) -> Path:
    """The files of a commit, in a folder."""
    from bench_common import ROOT

    found = subprocess.run(
        ["git", "archive", "--format=tar", commit], cwd=ROOT, capture_output=True
    )
    if found.returncode:
        sys.exit(f"bench_pairs.py: error: {commit}: {found.stderr.decode().strip()}")
    folder.mkdir()
    subprocess.run(["tar", "-x", "-C", str(folder)], input=found.stdout, check=True)
    return folder


def parse() -> argparse.Namespace:
    from bench_common import result_file
    from bench_step import SHAPES

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("commit", help="the older one")
    add("--shapes", nargs=2, choices=list(SHAPES), default=["8b", "1b"], metavar=("BASE", "SMALL"))
    add("--pairs", type=int, default=5)
    add("--batch", type=int, nargs="+", default=[1, 8, 64])
    add("--context", type=int, default=1024, help="tokens of each prompt")
    add("--tokens", type=int, default=64, help="tokens of a long run; a short one has a quarter")
    add("--repeats", type=int, default=5, help="runs of each batch in one engine")
    add("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    add("--check-shape", choices=list(SHAPES), default="135m")
    add("--engine-args", type=json.loads, default={}, metavar="JSON", help="for every engine")
    add("--smoke", action="store_true", help="tiny shapes and one pair, for a CPU")
    add("--json", type=result_file, help="write the result here")
    args = parser.parse_args()
    if args.smoke:
        args.shapes, args.check_shape, args.dtype = ["tiny", "tiny"], "tiny", "float32"
        args.batch, args.context, args.tokens = [1, 4], 32, 16
        args.pairs, args.repeats = 1, 1
        args.engine_args = {
            "enforce_eager": True, "kv_cache_memory_bytes": 32 << 20, "block_size": 32,
            **args.engine_args,
        }  # fmt: skip
    if args.tokens < 4 or min(args.batch) < 1 or min(args.repeats, args.pairs) < 1:
        parser.error("--tokens from 4, --batch, --pairs and --repeats from 1")
    return args


def main() -> None:
    from bench_common import ROOT, provenance, script_argv, write_result
    from bench_step import SHAPES, write_models, write_trio

    args = parse()
    os.environ.update({"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"})
    import torch

    common = {
        "batch": args.batch,
        "context": args.context,
        "tokens": args.tokens,
        "gpus": [0] if torch.cuda.is_available() else [],
    }
    engine = {"max_model_len": args.context + args.tokens, "max_num_seqs": max(args.batch)}
    engine |= {"dtype": args.dtype, **args.engine_args}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        trees = {"old": unpack(args.commit, root / "old"), "new": ROOT}
        task = {**common, "models": write_models(root, args.check_shape), "repeats": 0}
        task |= {"vocab": SHAPES[args.check_shape]["vocab_size"], "engine": engine}
        task |= {"batch": [min(4, max(args.batch))]}
        answers = {tree: run_in(path, task)["answers"] for tree, path in trees.items()}
        if answers["old"] != answers["new"]:
            sys.exit(f"bench_pairs.py: error: the trees choose other tokens: {answers}")
        task = {**common, "models": write_trio(root, args.shapes), "repeats": args.repeats}
        task |= {"vocab": SHAPES[args.shapes[0]]["vocab_size"]}
        task |= {"engine": {**engine, "load_format": "dummy"}}
        pairs: list[dict[str, dict]] = []
        for i in range(args.pairs):
            order = TREES if i % 2 == 0 else TREES[::-1]
            pairs.append({tree: run_in(trees[tree], task) for tree in order})
            print(f"pair {i + 1} of {args.pairs}: {pairs[-1]}", flush=True)
    result = {
        **provenance(script_argv("bench_pairs.py")),
        "old_commit": args.commit,
        "shapes": args.shapes,
        "dtype": args.dtype,
        "same_tokens": sum(map(len, answers["new"])),
        "compared": summary(pairs, args.batch),
        "pairs": pairs,
    }
    print(json.dumps({"compared": result["compared"]}, indent=2))
    write_result(args.json, result)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--task"]:
        wanted = json.loads(sys.argv[2])
        Path(wanted["out"]).write_text(json.dumps(measure(wanted)))
    else:
        main()
