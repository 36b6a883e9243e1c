#!/usr/bin/env python
"""What drafts of the expert gain: tokens a second beside the base alone and beside honest peers.

    VLLM_CPU_OMP_THREADS_BIND=0-1 python scripts/bench_speculation.py --json speculation_cpu.json
    python scripts/bench_speculation.py --trios demo --modes eager --tokens 32 --repeats 1   # quick

Systems, each an engine in a process of its own:

    base         the base alone in vLLM
    proxy        the three, without drafts
    expert       the three, the expert drafting in place (--speculative-tokens)
    auto         the same with --speculative-tokens auto
    second_copy  the three, and the expert loaded once more as vLLM's draft model
    base_drafted the base alone, with the small model as vLLM's draft model: the peer to beat

Trios: `demo`, the trained one in the box; `ceiling`, a base of 134M parameters and small models of
23M that nearly always agree on the next token, so that drafts gain the most they can; `ceiling-8b`,
the same with shapes of 8B and 1B, for a GPU. All engines of a trio live at once and take turns,
forth and back: a ratio is of runs seconds apart. Three engines of `ceiling-8b` fit into 80 GB:

    python scripts/bench_speculation.py --trios ceiling-8b --modes compiled --batches 1 64 \\
        --systems base expert base_drafted --engine-args '{"kv_cache_memory_bytes": 2147483648}'

Before anything is timed, answers with drafts must be those without, token by token: of `expert`,
`auto` and `second_copy` those of `proxy`, of `base_drafted` those of `base`. Otherwise nothing is
reported. A system whose plain form does not run is not compared: `same_tokens_as` says which were.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench_common import (
    ChildProcess,
    PeakMemory,
    engine,
    greedy,
    provenance,
    random_prompts,
    result_file,
    script_argv,
    write_result,
)
from bench_step import SHAPES

SYSTEMS = ("base", "proxy", "expert", "auto", "second_copy", "base_drafted")
PLAIN = {"expert": "proxy", "auto": "proxy", "second_copy": "proxy", "base_drafted": "base"}
PROMPT = 64
_SHAPES_134M = {
    "base": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12,
             "num_attention_heads": 12, "vocab_size": 32000},
    "small": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 8,
              "num_attention_heads": 4, "vocab_size": 32000},
}  # fmt: skip
_CEILINGS = {
    "ceiling": _SHAPES_134M,
    "ceiling-8b": {"base": SHAPES["8b"], "small": SHAPES["1b"]},
}


def write_ceiling(root: Path, shapes: dict[str, dict]) -> list[str]:
    """Three models of which base and expert say ``next[token]``, whatever came before.

    Layers write little into the residual stream, and the head looks for the embedding of the token
    before. The antiexpert's head is all but flat.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    vocab_size = shapes["base"]["vocab_size"]
    follows = torch.randperm(vocab_size, generator=torch.Generator().manual_seed(0)).to(device)
    folders = []
    for seed, role in enumerate(("base", "expert", "antiexpert"), 1):
        torch.manual_seed(seed)
        shape = shapes["base" if role == "base" else "small"]
        config = LlamaConfig(
            **{**shape, "tie_word_embeddings": False},
            max_position_embeddings=1024,
            dtype=torch.bfloat16,
        )
        with torch.device(device):
            model = LlamaForCausalLM(config)
        with torch.no_grad():
            table = model.model.embed_tokens.weight.normal_()
            model.lm_head.weight[follows] = table
            if role == "antiexpert":
                model.lm_head.weight *= 1e-3
            for layer in model.model.layers:
                layer.self_attn.o_proj.weight *= 0.05
                layer.mlp.down_proj.weight *= 0.05
        folder = root / role
        model.to(torch.bfloat16).save_pretrained(folder)
        del model
        folders.append(str(folder))
    if device == "cuda":
        torch.cuda.empty_cache()
    return folders


def models_of(trio: str, root: Path) -> tuple[list[str], str]:
    """Folders of base, expert and antiexpert, and the type that they run in."""
    if trio in _CEILINGS:
        return write_ceiling(root, _CEILINGS[trio]), "bfloat16"
    from proxy_vllm.demo import model_path

    return [str(model_path(role)) for role in ("base", "expert", "antiexpert")], "float32"


_llm: Any = None


def start(system: str, models: list[str], dtype: str, mode: str, args: argparse.Namespace) -> dict:
    """Start the engine of this process."""
    global _llm
    settings: dict[str, Any] = {
        "dtype": dtype, "enforce_eager": mode == "eager", "max_num_seqs": max(args.batches),
        # vLLM's own drafters stop near the limit.
        "max_model_len": PROMPT + args.tokens + 32, "disable_log_stats": False,
        "enable_prefix_caching": False, **args.engine_args,
    }  # fmt: skip
    drafter = {
        "model": models[1], "method": "draft_model", "num_speculative_tokens": args.drafts,
    }  # fmt: skip
    if system == "expert":
        settings["speculative_tokens"] = args.drafts
    elif system == "auto":
        settings["speculative_tokens"] = "auto"
    elif system in ("second_copy", "base_drafted"):
        settings["speculative_config"] = drafter
    begun = time.perf_counter()
    peak = PeakMemory([os.getpid()])
    _llm = engine(models[:1] if system.startswith("base") else models, **settings)
    _run(args, args.batches[0], args.tokens // 4)
    return {"start_s": round(time.perf_counter() - begun, 1), "peak_bytes": peak.stop()}


def _run(args: argparse.Namespace, batch: int, tokens: int) -> list[list[int]]:
    prompts = random_prompts(batch, PROMPT, args.vocab, seed=3)
    return [list(o.outputs[0].token_ids) for o in greedy(_llm, prompts, tokens)]


def answers(args: argparse.Namespace) -> list[list[int]]:
    return _run(args, max(args.batches), args.tokens)


def speed(args: argparse.Namespace, batch: int) -> float:
    """Tokens a second in decode: what a long run takes more than a short one."""
    took = []
    for tokens in (args.tokens // 4, args.tokens):
        begun = time.perf_counter()
        _run(args, batch, tokens)
        took.append(time.perf_counter() - begun)
    return batch * (args.tokens - args.tokens // 4) / (took[1] - took[0])


def acceptance() -> dict | None:
    """Of all drafts so far: the share accepted by position, and tokens a step of a request."""
    found = {m.name: m for m in _llm.get_metrics() if m.name.startswith("vllm:spec_decode")}
    drafts = getattr(found.get("vllm:spec_decode_num_drafts"), "value", 0)
    if not drafts:
        return None
    by_position = found["vllm:spec_decode_num_accepted_tokens_per_pos"].values
    return {
        "by_position": [round(n / drafts, 4) for n in by_position],
        "tokens_a_step": round(1 + sum(by_position) / drafts, 3),
    }


def measure(trio: str, mode: str, root: Path, args: argparse.Namespace) -> dict:
    models, dtype = models_of(trio, root)
    args.vocab = json.loads((Path(models[0]) / "config.json").read_text())["vocab_size"]
    children = {system: ChildProcess().__enter__() for system in args.systems}
    try:
        engines = {s: child(start, s, models, dtype, mode, args) for s, child in children.items()}
        given = {s: child(answers, args) for s, child in children.items()}
        same = {s: plain for s, plain in PLAIN.items() if s in given and plain in given}
        for system, plain in same.items():
            if given[system] != given[plain]:
                sys.exit(
                    f"bench_speculation.py: error: {trio}, {mode}: tokens of {system} are not those"
                    f" of {plain}"
                )
        turns: dict[int, list[dict[str, float]]] = {batch: [] for batch in args.batches}
        for turn in range(args.repeats):
            order = args.systems if turn % 2 == 0 else args.systems[::-1]
            for batch in args.batches:
                turns[batch].append({s: round(children[s](speed, args, batch), 2) for s in order})
                print(trio, mode, batch, turns[batch][-1], file=sys.stderr, flush=True)
        accepted = {s: child(acceptance) for s, child in children.items()}
    finally:
        for child in children.values():
            child.__exit__(None, None, None)

    def ratio(batch: int, over: str) -> float:
        return round(statistics.median(t[over] / t["base"] for t in turns[batch]), 3)

    return {
        "trio": trio,
        "mode": mode,
        "dtype": dtype,
        "same_tokens_as": same,
        "engines": engines,
        "acceptance": accepted,
        "batches": {
            str(batch): {
                "tokens_per_s": {
                    s: round(statistics.median(t[s] for t in turns[batch]), 1) for s in args.systems
                },
                "over_base": {s: ratio(batch, s) for s in args.systems} if "base" in args.systems
                else None,
                "turns": turns[batch],
            }
            for batch in args.batches
        },
    }  # fmt: skip


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--trios", nargs="+", choices=["demo", *_CEILINGS], default=["demo", "ceiling"])
    add("--modes", nargs="+", choices=["eager", "compiled"], default=["eager", "compiled"])
    add("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    add("--batches", nargs="+", type=int, default=[1, 8])
    add("--drafts", type=int, default=4, help="tokens drafted in a step")
    add("--tokens", type=int, default=128, help="tokens of a long run; a short one has a quarter")
    add("--repeats", type=int, default=3, help="turns of all systems")
    add("--engine-args", type=json.loads, default={}, metavar="JSON", help="for every engine")
    add("--json", type=result_file, help="write the result here")
    args = parser.parse_args()
    if args.tokens < 8 or min(*args.batches, args.repeats, args.drafts) < 1:
        parser.error("--tokens from 8, --batches, --repeats and --drafts from 1")
    return args


def main() -> None:
    args = parse()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    import torch

    if not torch.cuda.is_available():
        args.engine_args = {
            "kv_cache_memory_bytes": 256 << 20,
            "block_size": 32,
            **args.engine_args,
        }
    begun = time.monotonic()
    rows = []
    for trio in args.trios:
        for mode in args.modes:
            with tempfile.TemporaryDirectory() as root:
                rows.append(measure(trio, mode, Path(root), args))
    result = {
        **provenance(script_argv("bench_speculation.py")),
        "drafts": args.drafts,
        "prompt_tokens": PROMPT,
        "tokens": args.tokens,
        "took_s": round(time.monotonic() - begun, 1),
        "rows": rows,
    }
    print(json.dumps(result, indent=2))
    write_result(args.json, result)


if __name__ == "__main__":
    main()
