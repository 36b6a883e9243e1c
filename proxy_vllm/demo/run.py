"""Answer the demo's problems with vLLM: three models alone, and the trio through `ProxyLLM`."""

import os
from collections.abc import Callable, Sequence
from typing import Any

from proxy_vllm.demo import model_path
from proxy_vllm.demo.problems import MAX_ANSWER_TOKENS, Problem
from proxy_vllm.demo.report import SYSTEMS, Report


def engine_args() -> dict[str, Any]:
    """Small engines that start fast; float32 on a CPU, bfloat16 where FlashAttention asks it."""
    from vllm.platforms import current_platform

    return {
        "dtype": "float32" if current_platform.is_cpu() else "bfloat16",
        "max_model_len": 256,
        "max_num_seqs": 64,
        "kv_cache_memory_bytes": 256 * 2**20,
        "enforce_eager": True,
        "disable_log_stats": True,
    }


def answer(system: str, problems: Sequence[Problem], alpha: float, **overrides: Any) -> list[str]:
    """Greedy answers of one system, from an engine of its own that is shut down after."""
    from vllm import LLM, SamplingParams

    args = {**engine_args(), **overrides}
    if system == "proxy":
        from proxy_vllm import ProxyLLM

        llm = ProxyLLM(
            model=str(model_path("base")),
            expert=str(model_path("expert")),
            antiexpert=str(model_path("antiexpert")),
            alpha=alpha,
            **args,
        )
    else:
        llm = LLM(model=str(model_path(system)), **args)
    try:
        outputs = llm.generate(
            [problem.prompt for problem in problems],
            SamplingParams(temperature=0.0, max_tokens=MAX_ANSWER_TOKENS),
            use_tqdm=False,
        )
        return [output.outputs[0].text for output in outputs]
    finally:
        # The engine lives in a child process; the next one waits until it is gone.
        llm.llm_engine.engine_core.shutdown()


def run_demo(
    problems: Sequence[Problem], alpha: float, say: Callable[[str], None], **overrides: Any
) -> Report:
    """All four systems, one engine after the other; `overrides` are vLLM engine arguments."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    answers = {}
    for system, label in SYSTEMS.items():
        say(label)
        answers[system] = answer(system, problems, alpha, **overrides)
    return Report(problems, answers, alpha)
