"""Answer the demo's problems with vLLM: three models alone, and the trio through `ProxyLLM`.

Each system runs in a process of its own, so that its memory is free before the next one starts and
vLLM's messages can be kept for the case that it fails.
"""

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from proxy_vllm.demo import ROLES, model_path
from proxy_vllm.demo.child import ChildFailed, ChildProcess
from proxy_vllm.demo.problems import MAX_ANSWER_TOKENS, Problem
from proxy_vllm.demo.report import SYSTEMS, Report
from proxy_vllm.errors import UserError


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


def answer(system: str, prompts: Sequence[str], alpha: float) -> list[str]:
    """Greedy answers of one of `SYSTEMS`, from an engine in this process."""
    from vllm import SamplingParams

    if system == "proxy":
        from proxy_vllm import ProxyLLM

        llm = ProxyLLM(
            model=str(model_path("base")),
            expert=str(model_path("expert")),
            antiexpert=str(model_path("antiexpert")),
            alpha=alpha,
            **engine_args(),
        )
    else:
        from vllm import LLM

        llm = LLM(model=str(model_path(system)), **engine_args())
    outputs = llm.generate(
        list(prompts), SamplingParams(temperature=0.0, max_tokens=MAX_ANSWER_TOKENS), use_tqdm=False
    )
    return [output.outputs[0].text for output in outputs]


def answer_in_child(system: str, prompts: Sequence[str], alpha: float) -> list[str]:
    """`answer` in a process that ends with it.

    Its messages go to stderr where the user set `VLLM_LOGGING_LEVEL`; else only the last of them,
    when it fails. Raises `UserError` when it does.
    """
    # A second process for the engine would gain nothing here, and import vLLM once more.
    env = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", **os.environ}
    try:
        with ChildProcess(env, quiet="VLLM_LOGGING_LEVEL" not in os.environ) as child:
            return child(answer, system, prompts, alpha)
    except ChildFailed as error:
        print(error, file=sys.stderr)
        raise UserError(
            f"{SYSTEMS[system]} did not run through vLLM: its last messages are above,"
            " VLLM_LOGGING_LEVEL=DEBUG shows all"
        ) from None


def run_demo(problems: Sequence[Problem], alpha: float, say: Callable[[str], None]) -> Report:
    """All four systems on the same problems, one after the other; `say` hears which one runs."""
    for role in ROLES:
        model_path(role)
    prompts = [problem.prompt for problem in problems]
    answers = {}
    for system, label in SYSTEMS.items():
        say(label)
        answers[system] = answer_in_child(system, prompts, alpha)
    return Report(problems, answers, alpha)
