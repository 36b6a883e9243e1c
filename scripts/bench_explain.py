#!/usr/bin/env python
"""What `proxy_explain` costs: tokens/s where all rows of a batch ask, one in eight, or none.

    python scripts/bench_explain.py --json benchmarks/results/explain_cpu.json
    python scripts/bench_explain.py BASE --expert E --antiexpert A --batch 1 8 64

All three in one engine, in turn, `--rounds` times over. Before anything is timed, the tokens must
be the same in all three, and in float32 the values those of three Transformers models. Without BASE
the models are random: those of bench_cpu.py.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench_common import (
    ROOT,
    ChildProcess,
    engine,
    provenance,
    random_prompts,
    result_file,
    script_argv,
    write_result,
)
from bench_cpu import KV_BYTES, PROMPT_TOKENS, TRIO, make_models

ASKING = {"none": 0, "some": 8, "all": 1}  # one row of so many
TOLERANCE = 1e-4


def run(llm: Any, prompts: list[list[int]], tokens: int, every: int, top: int) -> list:
    """Greedy answers; one request of `every` asks for explanations, 0 for none."""
    from vllm import SamplingParams

    params = [
        SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False,
            extra_args={"proxy_explain": True, "proxy_explain_top": top}
            if every and i % every == 0 else None,
        )
        for i in range(len(prompts))
    ]  # fmt: skip
    asked = [{"prompt_token_ids": prompt} for prompt in prompts]
    return llm.generate(asked, params, use_tqdm=False)


def check(models: list[str], vocab: int, top: int, kwargs: dict) -> dict:
    """Hold a float32 engine against Transformers, and the three kinds of batch against each other.

    Raises AssertionError where they differ.
    """
    import torch
    from explained import assert_explained
    from reference_loop import Trio

    from proxy_vllm.explain import explanations

    llm = engine(models, **{**kwargs, "dtype": "float32", "enforce_eager": True})
    prompts = random_prompts(9, PROMPT_TOKENS, vocab)
    outputs = {name: run(llm, prompts, 8, every, top) for name, every in ASKING.items()}
    tokens = {
        name: [list(output.outputs[0].token_ids) for output in found]
        for name, found in outputs.items()
    }
    assert tokens["none"] == tokens["some"] == tokens["all"], "tokens differ: nothing is measured"
    trio = Trio.load(*models, torch.float32)
    for prompt, output in zip(prompts[:3], outputs["all"]):
        answer = output.outputs[0]
        found = explanations(answer)
        assert_explained(found, trio, prompt, list(answer.token_ids), 1.0, top)
    return {"tokens": "the same in all three", "values": f"within {TOLERANCE} of Transformers"}


def measure(models: list[str], vocab: int, args: argparse.Namespace, kwargs: dict) -> dict:
    """Tokens/s of each kind of batch, each round."""
    llm = engine(models, **{**kwargs, "dtype": args.dtype, "enforce_eager": args.enforce_eager})
    found: dict[str, dict[str, list[float]]] = {}
    for batch in args.batch:
        prompts = random_prompts(batch, PROMPT_TOKENS, vocab)
        rates: dict[str, list[float]] = {name: [] for name in ASKING}
        for every in ASKING.values():
            run(llm, prompts, 4, every, args.top)
        for _ in range(args.rounds):
            for name, every in ASKING.items():
                start = time.perf_counter()
                run(llm, prompts, args.tokens, every, args.top)
                rates[name].append(batch * args.tokens / (time.perf_counter() - start))
        found[str(batch)] = rates
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", nargs="?", help="random models if not given")
    parser.add_argument("--expert")
    parser.add_argument("--antiexpert")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--top", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument("--json", type=result_file, help="write the result here")
    args = parser.parse_args()
    if bool(args.base) != bool(args.expert and args.antiexpert):
        parser.error("BASE, --expert and --antiexpert: all three, or none")
    if args.base:
        models = [args.base, args.expert, args.antiexpert]
    else:
        folders = make_models(Path(tempfile.gettempdir()) / "proxy_vllm_bench_cpu")
        models = [folders[role] for role in TRIO]
    vocab = json.loads((Path(models[0]) / "config.json").read_text())["vocab_size"]
    kwargs = {
        "max_model_len": PROMPT_TOKENS + args.tokens,
        "max_num_seqs": max(9, *args.batch),
        "kv_cache_memory_bytes": KV_BYTES,
        "enable_prefix_caching": False,
    }
    with ChildProcess() as child:
        gate = child(check, models, vocab, args.top, kwargs)
    with ChildProcess() as child:
        rounds = child(measure, models, vocab, args, kwargs)
    batches = {
        batch: {
            **{f"{name}_tokens_per_s": round(statistics.median(r), 2) for name, r in rates.items()},
            **{
                f"{name}_over_none": round(
                    statistics.median(a / b for a, b in zip(rates[name], rates["none"])), 4
                )
                for name in ("some", "all")
            },
        }
        for batch, rates in rounds.items()
    }
    result = {
        **provenance(script_argv("bench_explain.py")),
        "correctness": gate,
        "top": args.top,
        "asking": {name: f"1 row in {n}" if n else "no row" for name, n in ASKING.items()},
        "batches": batches,
        "rounds": rounds,
    }
    print(json.dumps({k: v for k, v in result.items() if k != "rounds"}, indent=2))
    write_result(args.json, result)


# Children import this file too.
sys.path.append(str(ROOT / "tests"))

if __name__ == "__main__":
    main()
