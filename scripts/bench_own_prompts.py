#!/usr/bin/env python
"""What a prompt for each model costs in a decode step, at real shapes without real weights.

    python scripts/bench_own_prompts.py --json benchmarks/results/own_prompts_bench.json   # one GPU
    python scripts/bench_own_prompts.py --cpu --json benchmarks/results/own_prompts_cpu.json
    python scripts/bench_own_prompts.py --smoke --json /tmp/own_prompts.json           # tiny

Three systems: `off`, an engine without --own-prompts; `idle`, one with it whose requests read one
prompt; `own`, the same engine, whose experts read a longer prompt and antiexperts a shorter one.
A step is the difference of two runs of one batch that differ in length only. Both engines live in
processes of their own at the same time, and the three systems take turns, forth and back: a ratio
is of steps measured seconds apart, and the figure is the median of all turns with its interval.
Before that, an engine must choose the Transformers models' tokens in a batch of both kinds;
otherwise nothing is reported.

On a CPU, Triton's kernels run in its interpreter, thousands of times slower than on a GPU: steps
are given with the time in there and without, and ratios without. --cpu has models of a size at
which the rest is most of a step, and a vocabulary that the interpreted sampler gets through. Time
there is processor time of one thread, so that other load on the machine counts little.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

# Before PyTorch and Triton: it prepares the process for Model Runner V2 on a CPU.
import proxy_vllm  # noqa: F401  # isort: skip

from bench_common import (
    ChildProcess,
    compare_with_loop,
    greedy,
    percentiles,
    provenance,
    random_prompts,
    result_file,
    script_argv,
    write_result,
)
from bench_step import SHAPES, cuda_graphs, start_engine, write_models, write_trio

SHAPES["135m-narrow"] = {**SHAPES["135m"], "vocab_size": 512}
# How much longer the expert's prompt is than the base's, and the antiexpert's shorter: all three
# together read as much as with one prompt.
OFFSET = 16
CHECK_TOKENS = 12
KINDS = ("off", "idle", "own")
MEASURES = ("step_ms", "step_outside_interpreter_ms")
RATIOS = (("idle", "off"), ("own", "idle"), ("own", "off"))


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


class Measured:
    """The engine of this process, and how it is timed."""

    def __init__(self, models: list[str], args: argparse.Namespace, own_prompts: bool) -> None:
        self.args = args
        start = time.perf_counter()
        self.llm = start_engine(
            "proxy", models, args, dtype=args.dtype, load_format="dummy", max_num_seqs=args.batch,
            max_model_len=args.context + OFFSET + args.tokens, own_prompts=own_prompts,
            compilation_config={"cudagraph_capture_sizes": [args.batch]},
        )  # fmt: skip
        self.start_s = round(time.perf_counter() - start, 2)
        self.clock = getattr(time, clock_name())
        self.interpreted = Interpreted(self.clock)

    def timed(self, kind: str, tokens: int) -> tuple[float, float]:
        """Seconds of one run of the batch, whole and outside the interpreter."""
        batch = batch_of(kind, self.args)
        begun, inside = self.clock(), self.interpreted.seconds
        greedy(self.llm, batch, tokens)
        took = self.clock() - begun
        return took, took - (self.interpreted.seconds - inside)

    def step(self, kind: str) -> dict[str, float]:
        """Milliseconds of a step, as in ``MEASURES``."""
        short, whole = self.args.tokens // 4, self.args.tokens
        pairs = zip(MEASURES, self.timed(kind, short), self.timed(kind, whole), strict=True)
        return {name: 1e3 * (more - less) / (whole - short) for name, less, more in pairs}


_measured: Measured | None = None


def start(models: list[str], args: argparse.Namespace, own_prompts: bool) -> dict:
    """Start the engine of this process, and run each of its kinds of batch once."""
    global _measured
    _measured = Measured(models, args, own_prompts)
    for kind in KINDS[1:] if own_prompts else KINDS[:1]:
        _measured.step(kind)
    return {"start_s": _measured.start_s, "cuda_graphs": cuda_graphs(_measured.llm)}


def step(kind: str) -> dict[str, float]:
    assert _measured is not None
    return _measured.step(kind)


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
    llm = start_engine(
        "proxy", models, args, dtype=args.check_dtype, max_num_seqs=8, max_model_len=128,
        max_num_batched_tokens=64, own_prompts=True,
    )  # fmt: skip
    outputs = greedy(llm, prompts, CHECK_TOKENS, alphas)
    tokens = [list(o.outputs[0].token_ids) for o in outputs]
    trio = Trio.load(*models, torch.float32)
    return compare_with_loop(trio, prompts, tokens, args.check_dtype, alphas)


def take_turns(models: list[str], args: argparse.Namespace) -> tuple[dict, list[dict]]:
    """Facts about the two engines, and the steps of every system in every turn."""
    with ChildProcess() as off, ChildProcess() as own:
        engines = {"off": off(start, models, args, False), "own": own(start, models, args, True)}
        turns = []
        for turn in range(args.repeats):
            order = KINDS if turn % 2 == 0 else KINDS[::-1]
            turns.append({kind: (off if kind == "off" else own)(step, kind) for kind in order})
            print(f"turn {turn + 1}/{args.repeats}: {turns[-1]}", file=sys.stderr, flush=True)
    return engines, turns


def summary(turns: list[dict[str, dict[str, float]]]) -> dict:
    """Steps of each system over all turns, and the ratios within turns."""
    import numpy as np

    def steps(name: str, kind: str) -> list[float]:
        return [turn[kind][name] for turn in turns]

    def ratio(over: str, under: str) -> dict[str, float]:
        each = np.divide(steps(MEASURES[-1], over), steps(MEASURES[-1], under))
        resampled = np.random.default_rng(0).choice(each, (10_000, len(each)))
        low, high = np.percentile(np.median(resampled, axis=1), (2.5, 97.5))
        return {
            "median": round(float(np.median(each)), 4),
            "low": round(float(low), 4),
            "high": round(float(high), 4),
        }

    return {
        **{
            name: {kind: percentiles(steps(name, kind), (20, 50, 80)) for kind in KINDS}
            for name in MEASURES
        },
        "ratios": {f"{over}/{under}": ratio(over, under) for over, under in RATIOS},
        "turns": turns,
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
    add("--repeats", type=int, default=20, help="turns of the three systems")
    add("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    add("--check-shape", choices=list(SHAPES), default="135m")
    add("--check-dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    add("--engine-args", type=json.loads, default={}, metavar="JSON", help="for every engine")
    add("--cpu", action="store_true", help="shapes for a CPU, a few minutes")
    add("--smoke", action="store_true", help="tiny shapes, for a CPU")
    add("--json", type=result_file, help="write the result here")
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
    else:
        # Two engines share the GPU.
        args.engine_args = {"gpu_memory_utilization": 0.45, **args.engine_args}
    if args.cpu:
        args.shapes, args.context, args.tokens = ["135m-narrow"] * 2, 64, 24
    if args.smoke:
        args.shapes, args.batch, args.context, args.tokens = ["tiny", "tiny"], 4, 32, 8
        args.repeats = 2
    if args.tokens < 4 or min(args.batch, args.repeats) < 1 or args.context <= OFFSET:
        parser.error(f"--tokens from 4, --context from {OFFSET + 1}, --batch and --repeats from 1")
    return args


def main() -> None:
    args = parse()
    os.environ.update(args.environment)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        trio = write_models(root, args.check_shape)
        with ChildProcess() as child:
            checked = child(check, trio, args)
        if not checked["passed"]:
            sys.exit(f"bench_own_prompts.py: error: tokens differ from Transformers': {checked}")
        engines, turns = take_turns(write_trio(root, args.shapes), args)
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
        "engines": engines,
        "took_s": round(time.monotonic() - begun, 1),
        **summary(turns),
    }
    print(json.dumps(result, indent=2))
    write_result(args.json, result)


if __name__ == "__main__":
    main()
