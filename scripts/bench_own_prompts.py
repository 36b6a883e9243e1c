#!/usr/bin/env python
"""What a prompt for each model costs in a decode step, at real shapes without real weights.

    python scripts/bench_own_prompts.py --json benchmarks/results/own_prompts.json     # one GPU
    python scripts/bench_own_prompts.py --cpu --json benchmarks/results/own_prompts_cpu.json
    python scripts/bench_own_prompts.py --smoke --json /tmp/own_prompts.json           # tiny

Three systems: `off`, an engine without --own-prompts; `idle`, one with it whose requests read one
prompt; `own`, the same engine, whose experts read a longer prompt and antiexperts a shorter one.
A step is the difference of two runs of one batch that differ in length only. Engines have processes
of their own and take turns; in one engine `idle` and `own` take turns. Before that, an engine must
choose the Transformers models' tokens in a batch of both kinds; otherwise nothing is reported.

On a CPU, Triton's kernels run in its interpreter, thousands of times slower than on a GPU: steps
are given with the time in there and without, and ratios without. --cpu has models of a size at
which the rest is most of a step, and a vocabulary that the interpreted sampler gets through. Time
there is processor time of one thread, so that other load on the machine does not count.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

# Before PyTorch and Triton: it prepares the process for Model Runner V2 on a CPU.
import proxy_vllm  # noqa: F401  # isort: skip

from bench_common import (
    compare_with_loop,
    percentiles,
    provenance,
    random_prompts,
    script_argv,
)
from bench_step import SHAPES, cuda_graphs, engine, run_child, write_config, write_models

SHAPES["135m-narrow"] = {**SHAPES["135m"], "vocab_size": 512}
# How much longer the expert's prompt is than the base's, and the antiexpert's shorter: all three
# together read as much as with one prompt.
OFFSET = 16
CHECK_TOKENS = 12
KINDS = ("off", "idle", "own")
MEASURES = ("step_ms", "step_outside_interpreter_ms")


def parameters(tokens: int, alpha: float = 1.0, **prompts: list[int]):
    from vllm import SamplingParams

    named = {f"proxy_{role}_prompt": ids for role, ids in prompts.items()}
    return SamplingParams(
        temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False,
        extra_args={"proxy_alpha": alpha, **named},
    )  # fmt: skip


def batch_of(kind: str, args: argparse.Namespace) -> list[dict[str, list[int]]]:
    """Prompts of one batch: the base's alone, or one for each model."""
    vocab = min(SHAPES[shape]["vocab_size"] for shape in args.shapes)
    base, expert, antiexpert = (
        random_prompts(args.batch, args.context + more, vocab, seed)
        for seed, more in enumerate((0, OFFSET, -OFFSET))
    )
    if kind != "own":
        return [{"base": b} for b in base]
    return [
        {"base": b, "expert": e, "antiexpert": a}
        for b, e, a in zip(base, expert, antiexpert, strict=True)
    ]


def generate(llm, prompts: list[dict[str, list[int]]], tokens: int, alphas: list[float]):
    return llm.generate(
        [{"prompt_token_ids": prompt["base"]} for prompt in prompts],
        [
            parameters(tokens, alpha, **{r: ids for r, ids in prompt.items() if r != "base"})
            for prompt, alpha in zip(prompts, alphas, strict=True)
        ],
        use_tqdm=False,
    )


def clock_name() -> str:
    import torch

    return "perf_counter" if torch.cuda.is_available() else "process_time"


class Interpreted:
    """Seconds of `clock` that this process has spent in Triton's interpreter."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.seconds = 0.0
        if os.environ.get("TRITON_INTERPRET") != "1":
            return
        from triton.runtime.interpreter import GridExecutor

        launch = GridExecutor.__call__

        def timed(*args, **kwargs):
            begun = clock()
            try:
                return launch(*args, **kwargs)
            finally:
                self.seconds += clock() - begun

        GridExecutor.__call__ = timed


def measure(models: list[str], args: argparse.Namespace, kinds: list[str]) -> dict:
    """Step times in ms of each kind of batch in one engine, whole and outside the interpreter."""
    short, whole = args.tokens // 4, args.tokens
    start = time.perf_counter()
    llm = engine(
        "proxy", models, args, dtype=args.dtype, load_format="dummy", max_num_seqs=args.batch,
        max_model_len=args.context + OFFSET + whole, own_prompts=kinds != ["off"],
        compilation_config={"cudagraph_capture_sizes": [args.batch]},
    )  # fmt: skip
    started = time.perf_counter() - start
    batches = {kind: batch_of(kind, args) for kind in kinds}
    clock = getattr(time, clock_name())
    interpreted = Interpreted(clock)

    def timed(kind: str, tokens: int) -> tuple[float, float]:
        begun, inside = clock(), interpreted.seconds
        generate(llm, batches[kind], tokens, [1.0] * args.batch)
        took = clock() - begun
        return took, took - (interpreted.seconds - inside)

    result: dict = {"start_s": round(started, 2), "cuda_graphs": cuda_graphs(llm)}
    for name in MEASURES:
        result[name] = {kind: [] for kind in kinds}
    for kind in kinds:
        timed(kind, short)
    for _ in range(args.repeats):
        for kind in kinds:
            for name, less, more in zip(MEASURES, timed(kind, short), timed(kind, whole)):
                result[name][kind].append(1e3 * (more - less) / (whole - short))
    return result


def check(models: list[str], args: argparse.Namespace) -> dict:
    """Greedy tokens of requests with and without own prompts in one batch against Transformers."""
    import torch
    from reference_loop import Trio

    vocab = SHAPES[args.check_shape]["vocab_size"]
    lengths = [(24, 40, 9), (33, 0, 0), (5, 70, 0), (64, 31, 33), (40, 0, 0), (2, 3, 60)]
    ids = random_prompts(3 * len(lengths), max(map(max, lengths)), vocab)
    prompts = [
        {
            role: ids[3 * i + m][:length]
            for m, (role, length) in enumerate(zip(("base", "expert", "antiexpert"), row))
            if length
        }
        for i, row in enumerate(lengths)
    ]
    alphas = [1.0, 0.5, -0.5, 1.0, 0.0, 0.5]
    llm = engine(
        "proxy", models, args, dtype=args.check_dtype, max_num_seqs=8, max_model_len=128,
        max_num_batched_tokens=64, own_prompts=True,
    )  # fmt: skip
    outputs = generate(llm, prompts, CHECK_TOKENS, alphas)
    tokens = [list(o.outputs[0].token_ids) for o in outputs]
    trio = Trio.load(*models, torch.float32)
    return compare_with_loop(trio, prompts, tokens, args.check_dtype, alphas)


def child(args: argparse.Namespace) -> None:
    job = json.loads(args.child)
    if job["what"] == "check":
        result = check(job["models"], args)
    else:
        result = measure(job["models"], args, job["what"].split("+"))
    Path(job["result"]).write_text(json.dumps(result))


def summary(rounds: list[dict[str, dict]]) -> dict:
    """Steps of each system over all rounds, and their ratios: of all rounds, and of each."""

    def steps(name: str, chosen: list[dict[str, dict]]) -> dict[str, list[float]]:
        engines = [engine[name] for r in chosen for engine in r.values()]
        return {kind: [t for e in engines for t in e.get(kind, ())] for kind in KINDS}

    def ratios(chosen: list[dict[str, dict]]) -> dict[str, float]:
        middle = {kind: median(times) for kind, times in steps(MEASURES[-1], chosen).items()}
        pairs = (("idle", "off"), ("own", "idle"), ("own", "off"))
        return {f"{a}/{b}": round(middle[a] / middle[b], 4) for a, b in pairs}

    return {
        **{
            name: {k: percentiles(times, (20, 50, 80)) for k, times in steps(name, rounds).items()}
            for name in MEASURES
        },
        "ratios": ratios(rounds),
        "ratios_of_each_round": [ratios([r]) for r in rounds],
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shapes", nargs=2, choices=list(SHAPES), default=["8b", "1b"], metavar=("BASE", "SMALL"))
    add("--batch", type=int, default=8)
    add("--context", type=int, default=1024, help="tokens of the base's prompt")
    add("--tokens", type=int, default=64, help="tokens of a long run; a short one has a quarter")
    add("--repeats", type=int, default=5, help="of each system in a round")
    add("--rounds", type=int, default=2, help="starts of each engine")
    add("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    add("--check-shape", choices=list(SHAPES), default="135m")
    add("--check-dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    add("--engine-args", type=json.loads, default={}, metavar="JSON", help="for every engine")
    add("--cpu", action="store_true", help="shapes for a CPU, a few minutes")
    add("--smoke", action="store_true", help="tiny shapes, for a CPU")
    add("--json", help="write the result here")
    add("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.environment = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    if args.cpu or args.smoke:
        args.check_shape, args.check_dtype = "tiny", "float32"
        args.engine_args = {
            "enforce_eager": True, "kv_cache_memory_bytes": 512 << 20, "block_size": 32,
            **args.engine_args,
        }  # fmt: skip
        args.environment |= {
            "PROXY_VLLM_CPU_RUNNER": "v2",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "OMP_NUM_THREADS": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        }
    if args.cpu:
        args.shapes, args.context, args.tokens = ["135m-narrow"] * 2, 64, 24
    if args.smoke:
        args.shapes, args.batch, args.context, args.tokens = ["tiny", "tiny"], 4, 32, 8
        args.repeats, args.rounds = 1, 1
    if args.tokens < 4 or min(args.batch, args.repeats, args.rounds) < 1 or args.context <= OFFSET:
        parser.error(
            f"--tokens from 4, --context from {OFFSET + 1}, --batch, --repeats, --rounds from 1"
        )
    return args


def main() -> None:
    args = parse()
    if args.child:
        child(args)
        return
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        checked = run_child("check", "proxy", write_models(root, args.check_shape), args, __file__)
        if not checked["passed"]:
            sys.exit(f"bench_own_prompts.py: error: tokens differ from Transformers': {checked}")
        base, small = (write_config(root, shape) for shape in args.shapes)
        rounds = [
            {
                kinds: run_child(kinds, "proxy", [base, small, small], args, __file__)
                for kinds in turn
            }
            for turn in (("off", "idle+own"), ("idle+own", "off")) * args.rounds
        ][: args.rounds]
    result = {
        **provenance(script_argv("bench_own_prompts.py")),
        "shapes": {"base": args.shapes[0], "expert": args.shapes[1], "antiexpert": args.shapes[1]},
        "batch": args.batch,
        "prompt_tokens": {
            "base": args.context,
            "expert": args.context + OFFSET,
            "antiexpert": args.context - OFFSET,
        },
        "dtype": args.dtype,
        "clock": clock_name(),
        "correctness": {**checked, "shape": args.check_shape, "dtype": args.check_dtype},
        "engines": [
            {k: {"start_s": v["start_s"], "cuda_graphs": v["cuda_graphs"]} for k, v in r.items()}
            for r in rounds
        ],
        "took_s": round(time.monotonic() - begun, 1),
        **summary(rounds),
    }
    print(json.dumps(result, indent=2))
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
