#!/usr/bin/env python
"""Proxy-tuned decoding on a CPU: beside the Transformers loop, and beside its three models alone.

    python scripts/bench_cpu.py --json benchmarks/results/cpu.json

Each figure comes from a process of its own, all of them in one run, `--rounds` times over, so that
ratios hold when the machine's speed drifts. Before anything is timed, a float32 engine must equal
the Transformers loop token by token. Models are random: a Llama of 135M and two small ones.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

from bench_common import (
    ChildProcess,
    engine,
    greedy,
    provenance,
    random_prompts,
    result_file,
    script_argv,
    write_result,
)

SHAPES = {
    "base": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
             "num_attention_heads": 9, "num_key_value_heads": 3},
    "expert": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 8,
               "num_attention_heads": 4, "num_key_value_heads": 2},
}  # fmt: skip
SHAPES["antiexpert"] = SHAPES["expert"]
TRIO = tuple(SHAPES)
VOCAB = 49152
KV_BYTES = 512 << 20
PROMPT_TOKENS = 64


def make_models(root: Path) -> dict[str, str]:
    """Write the random trio in bfloat16 and return its folders."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folders = {}
    for seed, (role, shape) in enumerate(SHAPES.items()):
        folder = root / role
        folders[role] = str(folder)
        if (folder / "config.json").exists():
            continue
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=VOCAB, tie_word_embeddings=True, max_position_embeddings=2048, **shape
        )
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folders


def prompts(batch: int) -> list[list[int]]:
    return random_prompts(batch, PROMPT_TOKENS, VOCAB)


class LargestProcess(threading.Thread):
    """Peak resident memory of the largest of this process and its children: a worker's."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes = 0

    def run(self) -> None:
        import psutil

        me = psutil.Process()
        while True:
            for process in [me, *me.children(recursive=True)]:
                with suppress(psutil.Error):
                    self.bytes = max(self.bytes, process.memory_info().rss)
            time.sleep(0.2)


def measure_vllm(what: str, folders: dict[str, str], args: argparse.Namespace) -> dict:
    """Decode step and throughput of `proxy`, or of one member alone, in vLLM."""
    largest = LargestProcess()
    largest.start()
    llm = engine(
        [folders[role] for role in (TRIO if what == "proxy" else (what,))],
        dtype="bfloat16", max_model_len=512, max_num_seqs=max(args.batch),
        kv_cache_memory_bytes=KV_BYTES, enable_prefix_caching=False,
        enforce_eager=args.enforce_eager,
    )  # fmt: skip

    def run(batch: int, tokens: int) -> float:
        requests = prompts(batch)
        start = time.perf_counter()
        greedy(llm, requests, tokens)
        return time.perf_counter() - start

    result = {}
    for batch in args.batch:
        run(batch, 4)
        short = run(batch, args.tokens // 4)
        whole = run(batch, args.tokens)
        steps = args.tokens - args.tokens // 4
        result[str(batch)] = {
            "step_ms": 1000 * (whole - short) / steps,
            "tokens_per_s": batch * args.tokens / whole,
        }
    result["peak_rss_largest_process"] = largest.bytes
    return result


def measure_loop(folders: dict[str, str], args: argparse.Namespace) -> dict:
    """The Transformers loop with KV caches on the same prompts."""
    import torch
    from reference_loop import Trio, greedy_batch

    torch.set_num_threads(os.cpu_count() or 1)
    trio = Trio.load(*(folders[role] for role in TRIO), torch.bfloat16)
    result = {}
    for batch in args.batch:
        greedy_batch(trio, prompts(batch), 2)
        start = time.perf_counter()
        greedy_batch(trio, prompts(batch), args.tokens)
        took = time.perf_counter() - start
        result[str(batch)] = {"tokens_per_s": batch * args.tokens / took}
    return result


def check_correctness(folders: dict[str, str]) -> None:
    """Raise unless a float32 engine equals the Transformers loop on these models."""
    import reference_loop
    import torch

    llm = engine(
        [folders[role] for role in TRIO], dtype="float32", max_model_len=512,
        kv_cache_memory_bytes=KV_BYTES, enforce_eager=True,
    )  # fmt: skip
    trio = reference_loop.Trio.load(*(folders[role] for role in TRIO), torch.float32)
    for prompt, output in zip(prompts(4), greedy(llm, prompts(4), 8)):
        want, _ = reference_loop.greedy(trio, prompt, 8)
        assert list(output.outputs[0].token_ids) == want, "not token-exact: nothing is measured"


def run_child(what: str, folders: dict[str, str], args: argparse.Namespace) -> dict:
    """One round's figures of `proxy`, `loop` or a member alone, in a process of its own."""
    with ChildProcess() as child:
        if what == "loop":
            return child(measure_loop, folders, args)
        return child(measure_vllm, what, folders, args)


def summarise(rounds: list[dict], args: argparse.Namespace) -> dict:
    """Medians over rounds of each figure, and of each ratio taken within one round."""
    rows = {}
    for batch in map(str, args.batch):
        each = [
            (r["proxy"][batch], r["loop"][batch], r["base"][batch], r["expert"][batch])
            for r in rounds
        ]
        figures = {
            "proxy_tokens_per_s": [p["tokens_per_s"] for p, *_ in each],
            "loop_tokens_per_s": [loop["tokens_per_s"] for _, loop, *_ in each],
            "speedup_over_loop": [p["tokens_per_s"] / loop["tokens_per_s"] for p, loop, *_ in each],
            "proxy_step_ms": [p["step_ms"] for p, *_ in each],
            # Expert and antiexpert have one shape.
            "sum_of_three_alone_ms": [b["step_ms"] + 2 * e["step_ms"] for *_, b, e in each],
            "step_over_sum_of_three": [
                p["step_ms"] / (b["step_ms"] + 2 * e["step_ms"]) for p, _, b, e in each
            ],
        }
        rows[batch] = {name: round(statistics.median(v), 3) for name, v in figures.items()}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--models",
        default=str(Path(tempfile.gettempdir()) / "proxy_vllm_bench_cpu"),
        help="where models lie",
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument("--json", type=result_file, help="write the result here")
    args = parser.parse_args()
    folders = make_models(Path(args.models))
    weights = sum((Path(f) / "model.safetensors").stat().st_size for f in folders.values())
    with ChildProcess() as child:
        child(check_correctness, folders)
    rounds = []
    for number in range(args.rounds):
        parts = ("proxy", "loop", "base", "expert")
        rounds.append({what: run_child(what, folders, args) for what in parts})
        print(f"round {number + 1}/{args.rounds}: {json.dumps(rounds[-1])}", file=sys.stderr)

    largest = max(r["proxy"]["peak_rss_largest_process"] for r in rounds)
    result = {
        **provenance(script_argv("bench_cpu.py")),
        "correctness": "float32 token-exact against scripts/reference_loop.py",
        "batches": summarise(rounds, args),
        "memory": {
            "weights_bytes": weights,
            "kv_cache_bytes": KV_BYTES,
            "peak_rss_largest_process": largest,
            "overhead_gib": round((largest - weights - KV_BYTES) / 2**30, 3),
        },
        "rounds": rounds,
    }
    print(json.dumps({k: v for k, v in result.items() if k != "rounds"}, indent=2))
    write_result(args.json, result)


if __name__ == "__main__":
    main()
