"""One replica, offline, in a process of its own: an engine of vLLM, or the Transformers loop.

Replicas load each on their own and start each batch together: a process writes `ready`, and waits
for the parent's `go`. Times are vLLM's own, from `RequestOutput.metrics`.
"""

import json
import time
from pathlib import Path
from typing import Any

from bench_common import compare_with_loop, random_prompts

ROLES = ("base", "expert", "antiexpert", "tuned")


def engine(job: dict[str, Any], system: str) -> Any:
    """`proxy`, or a member alone, in vLLM."""
    kwargs = {
        "max_num_seqs": max(job["batches"]),
        "max_model_len": job["input_len"] + job["output_len"],
        "enable_prefix_caching": False,
        "disable_log_stats": False,
        "skip_tokenizer_init": True,
        "dtype": job["dtype"],
        "tensor_parallel_size": job["tp"],
        **job["engine_args"],
    }
    models = job["models"]
    if system == "proxy":
        from proxy_vllm import ProxyLLM

        return ProxyLLM(
            models["base"], expert=models["expert"], antiexpert=models["antiexpert"], **kwargs
        )
    from vllm import LLM

    return LLM(models[system], **kwargs)


def greedy(llm: Any, prompts: list[list[int]], tokens: int, alphas: list[float] | None = None):
    """Greedy outputs of exactly `tokens` tokens, in the order of the prompts."""
    from vllm import SamplingParams

    params = [
        SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False,
            extra_args=None if alphas is None else {"proxy_alpha": alphas[i]},
        )
        for i in range(len(prompts))
    ]  # fmt: skip
    return llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)


def together(folder: Path, name: str) -> None:
    """Say that this process is ready, and wait until all are."""
    (folder / f"{name}.ready").touch()
    while not (folder / f"{name.split('-')[0]}.go").exists():
        if not folder.exists():
            raise SystemExit("the parent is gone")
        time.sleep(0.005)


def measure_vllm(job: dict[str, Any]) -> dict[str, Any]:
    """Per batch: wall-clock interval, output tokens, and TTFT and TPOT of each request in ms."""
    llm = engine(job, job["system"])
    result = {}
    for number, batch in enumerate(job["batches"]):
        prompts = random_prompts(batch, job["input_len"], job["vocab"], seed=job["index"])
        for _ in range(job["warmups"]):
            greedy(llm, prompts, min(4, job["output_len"]))
        together(Path(job["folder"]), f"{number}-{job['index']}")
        start = time.time()
        outputs = greedy(llm, prompts, job["output_len"])
        end = time.time()
        stats = [o.metrics for o in outputs]
        result[str(batch)] = {
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
    return result


def load_loop(job: dict[str, Any]) -> Any:
    """The Transformers loop's models, on the GPU where there is one."""
    import torch
    from reference_loop import Trio

    models = job["models"]
    trio = Trio.load(
        models["base"], models["expert"], models["antiexpert"], getattr(torch, job["dtype"])
    )
    if torch.cuda.is_available():
        torch.set_default_device("cuda")  # the loop makes its tensors where PyTorch makes them
        for model in trio.models():
            model.to("cuda")
    return trio


def measure_loop(job: dict[str, Any]) -> dict[str, Any]:
    """The loop's rows all go one pace, so TTFT is the time of one token, TPOT that of the rest."""
    from reference_loop import greedy_batch

    trio = load_loop(job)
    result = {}
    for number, batch in enumerate(job["batches"]):
        prompts = random_prompts(batch, job["input_len"], job["vocab"], seed=job["index"])
        greedy_batch(trio, prompts, 2)
        together(Path(job["folder"]), f"{number}-{job['index']}")
        begun = time.perf_counter()
        greedy_batch(trio, prompts, 1)
        first = time.perf_counter() - begun
        start = time.time()
        tokens = greedy_batch(trio, prompts, job["output_len"])
        end = time.time()
        rest = max(0.0, end - start - first) / max(1, job["output_len"] - 1)
        result[str(batch)] = {
            "start": start,
            "end": end,
            "tokens": tokens,
            "ttft_ms": [1e3 * first] * batch,
            "tpot_ms": [1e3 * rest] * batch,
        }
    return result


def check(job: dict[str, Any]) -> dict[str, Any]:
    """Hold a small batch of the engine under test against the Transformers models."""
    count, alphas = 4, [1.0, 0.0, 0.5, -0.5]
    prompts = random_prompts(count, job["input_len"], job["vocab"])
    llm = engine({**job, "batches": [count]}, "proxy")
    outputs = greedy(llm, prompts, job["output_len"], alphas)
    tokens = [list(o.outputs[0].token_ids) for o in outputs]
    llm.llm_engine.engine_core.shutdown()
    del llm
    import torch
    from reference_loop import Trio

    models = job["models"]
    trio = Trio.load(
        models["base"], models["expert"], models["antiexpert"], getattr(torch, job["dtype"])
    )
    return compare_with_loop(trio, prompts, tokens, job["dtype"], alphas)


def run(job: dict[str, Any]) -> None:
    """Do the job and write its result where it says."""
    kinds = {"check": check, "loop": measure_loop}
    result = kinds.get(job["system"], measure_vllm)(job)
    Path(job["result"]).write_text(json.dumps(result))
