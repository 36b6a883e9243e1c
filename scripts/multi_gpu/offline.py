"""One replica, offline, in a process of its own: an engine of vLLM, or the Transformers loop.

`load` and then, for each batch, `warm_up` and `measure` run in that process one after another, so
that the caller can start each batch in all replicas together. Times are vLLM's own, from
`RequestOutput.metrics`.
"""

import time
from typing import Any

from bench_common import compare_with_loop, engine, greedy, random_prompts

TRIO = ("base", "expert", "antiexpert")
# What `load` leaves in its process for the calls after it.
_job: dict[str, Any] = {}
_model: Any = None


def start_engine(job: dict[str, Any], system: str, batch: int) -> Any:
    """`proxy`, or a member alone, in vLLM."""
    return engine(
        [job["models"][role] for role in (TRIO if system == "proxy" else (system,))],
        **{
            "max_num_seqs": batch,
            "max_model_len": job["input_len"] + job["output_len"],
            "enable_prefix_caching": False,
            "disable_log_stats": False,
            "dtype": job["dtype"],
            "tensor_parallel_size": job["tp"],
            **job["engine_args"],
        },
    )


def load(job: dict[str, Any]) -> None:
    """Load what the job measures, for the calls that follow in this process."""
    global _job, _model
    loop = job["system"] == "loop"
    _job = job
    _model = load_loop(job) if loop else start_engine(job, job["system"], max(job["batches"]))


def prompts_of(batch: int) -> list[list[int]]:
    return random_prompts(batch, _job["input_len"], _job["vocab"], seed=_job["index"])


def warm_up(batch: int) -> None:
    """Everything that the first run of a batch pays for."""
    if _job["system"] == "loop":
        from reference_loop import greedy_batch

        greedy_batch(_model, prompts_of(batch), 2)
        return
    for _ in range(_job["warmups"]):
        greedy(_model, prompts_of(batch), min(4, _job["output_len"]))


def measure(batch: int) -> dict[str, Any]:
    """Wall-clock interval, output tokens, and TTFT and TPOT of each request in ms."""
    if _job["system"] == "loop":
        return measure_loop(batch)
    start = time.time()
    outputs = greedy(_model, prompts_of(batch), _job["output_len"])
    end = time.time()
    stats = [o.metrics for o in outputs]
    return {
        "start": start,
        "end": end,
        "tokens": [list(o.outputs[0].token_ids) for o in outputs],
        "ttft_ms": [1e3 * s.first_token_latency for s in stats],
        "tpot_ms": [
            1e3 * (s.last_token_ts - s.first_token_ts) / (s.num_generation_tokens - 1)
            for s in stats
            if s.num_generation_tokens > 1
        ],
    }


def load_loop(job: dict[str, Any]) -> Any:
    """The Transformers loop's models, on the GPU where there is one."""
    import torch
    from reference_loop import Trio

    trio = Trio.load(*(job["models"][role] for role in TRIO), getattr(torch, job["dtype"]))
    if torch.cuda.is_available():
        torch.set_default_device("cuda")  # the loop makes its tensors where PyTorch makes them
        for model in trio.models():
            model.to("cuda")
    return trio


def measure_loop(batch: int) -> dict[str, Any]:
    """The loop's rows all go one pace, so TTFT is the time of one token, TPOT that of the rest."""
    from reference_loop import greedy_batch

    prompts, tokens_each = prompts_of(batch), _job["output_len"]
    begun = time.perf_counter()
    greedy_batch(_model, prompts, 1)
    first = time.perf_counter() - begun
    start = time.time()
    tokens = greedy_batch(_model, prompts, tokens_each)
    end = time.time()
    rest = max(0.0, end - start - first) / max(1, tokens_each - 1)
    return {
        "start": start,
        "end": end,
        "tokens": tokens,
        "ttft_ms": [1e3 * first] * batch,
        "tpot_ms": [1e3 * rest] * batch,
    }


def check(job: dict[str, Any]) -> dict[str, Any]:
    """Hold a small batch of the engine under test against the Transformers models."""
    import torch
    from reference_loop import Trio

    alphas = [1.0, 0.0, 0.5, -0.5]
    prompts = random_prompts(len(alphas), job["input_len"], job["vocab"])
    llm = start_engine(job, "proxy", len(alphas))
    outputs = greedy(llm, prompts, job["output_len"], alphas)
    tokens = [list(o.outputs[0].token_ids) for o in outputs]
    trio = Trio.load(*(job["models"][role] for role in TRIO), getattr(torch, job["dtype"]))
    return compare_with_loop(trio, prompts, tokens, job["dtype"], alphas)
