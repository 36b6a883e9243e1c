#!/usr/bin/env python
"""A base elsewhere beside a client of three servers, at several latencies, in one run.

    python scripts/bench_remote_base.py --json benchmarks/results/remote_base_cpu.json

Plain vLLM serves the base; a proxy before it adds a round trip's latency to every call and counts
calls and bytes. The gate comes first: in `exact` mode, greedy answers at k = 1, 5 and 20 must be
those of the Transformers loop, token for token, and no certified token may differ. Then the
figures: round trips, questions, bytes and wall time, beside `remote_logprobs.py`, which asks three
servers at every token. Two trios: the one in the box, and a random one with 49,152 tokens.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bench_common
import torch
from multi_gpu.processes import servers
from reference_loop import Trio, greedy
from remote_base_bench.latency_proxy import LatencyProxy
from remote_base_bench.serving import serving

ROLES = ("base", "expert", "antiexpert")
LARGE_VOCABULARY = 49152
ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 256,
    "kv_cache_memory_bytes": 256 << 20,
}


def box_trio(count: int) -> tuple[dict[str, str], list[list[int]]]:
    """The trained trio, and questions that it was made for."""
    from transformers import AutoTokenizer

    from proxy_vllm.demo import model_path
    from proxy_vllm.demo.problems import make_problems

    models = {role: str(model_path(role)) for role in ROLES}
    tokenizer = AutoTokenizer.from_pretrained(models["base"])
    return models, [tokenizer(p.prompt).input_ids for p in make_problems(n=count)]


def large_trio(count: int, folder: Path) -> tuple[dict[str, str], list[list[int]]]:
    """A random trio of a large vocabulary, and random prompts."""
    sys.path.insert(0, str(bench_common.ROOT / "tests"))
    from tiny_models import make_model

    models = {}
    for seed, role in enumerate(ROLES):
        models[role] = make_model(folder / role, seed=seed, vocab=LARGE_VOCABULARY, layers=1)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(4, 24, (count,), generator=generator).tolist()
    return models, [
        torch.randint(4, LARGE_VOCABULARY, (n,), generator=generator).tolist() for n in lengths
    ]


@contextlib.contextmanager
def plain_servers(models: dict[str, str], roles: tuple[str, ...]) -> Iterator[dict[str, str]]:
    """URLs of plain vLLM servers, one a role."""
    options = {**ENGINE, "max_logprobs": 200}
    env = {**os.environ, "VLLM_LOGGING_LEVEL": "WARNING"}
    specs = [
        {"system": role, "models": models, "engine_args": options, "dp": 1, "tp": 1, "env": env}
        for role in roles
    ]
    with servers(specs) as started:
        yield {role: server.url for role, server in zip(roles, started)}


def ours(llm: Any, prompts: list[list[int]], max_tokens: int, **settings: Any) -> dict[str, Any]:
    """One run of all prompts with these settings of the endpoint."""
    from vllm import SamplingParams

    endpoint = llm.llm_engine.engine_core.endpoint
    endpoint.settings = dataclasses.replace(endpoint.settings, **settings)
    endpoint.top = endpoint.settings.top_logprobs
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    inputs = [{"prompt_token_ids": ids} for ids in prompts]
    begun = time.perf_counter()
    outputs = llm.generate(inputs, params, use_tqdm=False)
    seconds = time.perf_counter() - begun
    reports = [output.kv_transfer_params["proxy"] for output in outputs]
    usage = {
        name: sum(report["usage"][name] for report in reports)
        for name in ("trips", "calls", "questions", "tokens", "certified")
    }
    return {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "certified": [report["certified"] for report in reports],
        "seconds": round(seconds, 2),
        "usage": usage,
    }


def gate(
    run: dict[str, Any], expected: list[list[int]], steps: list[list[torch.Tensor]]
) -> dict[str, int]:
    """Count wrong answers; end the run where a certified token is wrong beyond rounding."""
    wrong = near = 0
    for tokens, truth, sure, rows in zip(run["tokens"], expected, run["certified"], steps):
        at = next((i for i, (a, b) in enumerate(zip(tokens, truth)) if a != b), None)
        if at is None:
            continue
        gap = float(rows[at][truth[at]] - rows[at][tokens[at]])
        if gap < 1e-3:
            near += 1  # equal up to the rounding of two float32 implementations
            continue
        wrong += 1
        if sure[at]:
            sys.exit(f"bench_remote_base.py: error: token {at} is certified and wrong by {gap:.4f}")
    return {"prompts": len(expected), "wrong": wrong, "equal_up_to_rounding": near}


def measure(
    llm: Any,
    proxies: dict[str, LatencyProxy],
    urls: dict[str, str],
    prompts: list[list[int]],
    expected: list[list[int]],
    args: argparse.Namespace,
) -> list[dict[str, Any]]:
    """Rows of figures: every provider at every latency."""
    import remote_logprobs

    rows = []
    for milliseconds in args.latencies:
        for proxy in proxies.values():
            proxy.seconds = milliseconds / 1000
        for name, settings in {
            "exact": {"mode": "exact", "drafts": 0},
            "exact, 4 drafts": {"mode": "exact", "drafts": 4},
            "exact, 8 drafts": {"mode": "exact", "drafts": 8},
            "top-k": {"mode": "top-k", "drafts": 0},
        }.items():
            base = proxies["base"]
            base.calls = base.bytes = 0
            run = ours(llm, prompts, args.tokens, top_logprobs=args.k, **settings)
            usage = run["usage"]
            rows.append(
                {
                    "provider": name,
                    "latency_ms": milliseconds,
                    "seconds": run["seconds"],
                    "tokens": usage["tokens"],
                    "trips": usage["trips"],
                    "questions": usage["questions"],
                    # One after another at most: questions about a token may go out at once.
                    "round_trips": usage["trips"] + usage["questions"],
                    "calls": base.calls,
                    "kilobytes": round(base.bytes / 1024, 1),
                    "wrong_answers": sum(a != b for a, b in zip(run["tokens"], expected)),
                }
            )
        for proxy in proxies.values():
            proxy.calls = proxy.bytes = 0
        begun = time.perf_counter()
        found = remote_logprobs.generate(urls, prompts, args.tokens, logprobs=100)
        seconds = time.perf_counter() - begun
        tokens = sum(map(len, found.tokens))
        rows.append(
            {
                "provider": "three servers",
                "latency_ms": milliseconds,
                "seconds": round(seconds, 2),
                "tokens": tokens,
                "trips": tokens,
                "questions": 0,
                "round_trips": tokens,
                "calls": sum(proxy.calls for proxy in proxies.values()),
                "kilobytes": round(sum(p.bytes for p in proxies.values()) / 1024, 1),
                "wrong_answers": sum(a != b for a, b in zip(found.tokens, expected)),
            }
        )
        for row in rows[-5:]:
            print(json.dumps(row), flush=True)
    return rows


def bench_trio(
    models: dict[str, str], prompts: list[list[int]], args: argparse.Namespace, figures: bool
) -> dict[str, Any]:
    """The gate of one trio, and its figures if wanted."""
    from proxy_vllm import ProxyLLM

    trio = Trio.load(*(models[role] for role in ROLES), torch.float32)
    answers = [greedy(trio, ids, args.tokens) for ids in prompts]
    expected, steps = [tokens for tokens, _ in answers], [rows for _, rows in answers]
    roles = ROLES if figures else ROLES[:1]
    with plain_servers(models, roles) as targets, contextlib.ExitStack() as stack:
        proxies = {role: LatencyProxy(url) for role, url in targets.items()}
        urls = {role: stack.enter_context(serving(proxy.app)) for role, proxy in proxies.items()}
        llm = ProxyLLM(
            expert=models["expert"],
            antiexpert=models["antiexpert"],
            base_url=f"{urls['base']}/v1",
            base_model="model",
            # With drafts the start finds out whether the endpoint compares; runs set their number.
            base_args={"max_questions": 64, "drafts": 1},
            **ENGINE,
        )
        result: dict[str, Any] = {"gate": {}}
        for k in (1, 5, 20):
            run = ours(llm, prompts, args.tokens, top_logprobs=k, drafts=0)
            drafted = ours(llm, prompts, args.tokens, top_logprobs=k, drafts=8)
            for name, each in {f"k={k}": run, f"k={k}, 8 drafts": drafted}.items():
                checked = gate(each, expected, steps) | each["usage"]
                result["gate"][name] = checked
                print(f"{name}: {json.dumps(checked)}", flush=True)
                if checked["wrong"]:
                    sys.exit("bench_remote_base.py: error: exact mode gave a wrong answer")
        if figures:
            few = slice(args.timed_prompts)
            result["rows"] = measure(llm, proxies, urls, prompts[few], expected[few], args)
        llm.llm_engine.engine_core.shutdown()
        del llm
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=100, help="of the gate")
    parser.add_argument("--timed-prompts", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--latencies", type=int, nargs="+", default=[0, 50, 200], metavar="MS")
    parser.add_argument("--k", type=int, default=20, help="log-probabilities asked for")
    parser.add_argument("--json", type=bench_common.result_file, help="write the result here")
    args = parser.parse_args()
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    results = {**bench_common.provenance(sys.argv), "trios": {}}
    results["trios"]["box"] = bench_trio(*box_trio(args.prompts), args, figures=True)
    with tempfile.TemporaryDirectory() as folder:
        large = large_trio(args.prompts, Path(folder))
        # Random models disagree about nearly every token, which is then asked about many times.
        args.tokens = min(args.tokens, 8)
        results["trios"][f"{LARGE_VOCABULARY} tokens"] = bench_trio(*large, args, figures=False)
    bench_common.write_result(args.json, results)


if __name__ == "__main__":
    main()
