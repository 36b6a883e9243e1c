"""Answer the demo's problems with vLLM: three models alone, and the trio through `ProxyLLM`.

Each system runs in a process of its own, so that its memory is free before the next one starts and
vLLM's messages can be kept for the case that it fails.
"""

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from proxy_vllm.demo import ADAPTERS, ROLES, adapter_path, model_path
from proxy_vllm.demo.child import ChildFailed, ChildProcess
from proxy_vllm.demo.problems import MAX_ANSWER_TOKENS, Problem
from proxy_vllm.demo.report import NO_ADAPTER, SWITCHING, SYSTEMS, Report
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


def answer_each_way(label: str, prompts: Sequence[str], alpha: float) -> dict[str, list[str]]:
    """Greedy answers of one engine without an adapter and with each, all in one batch."""
    from vllm import SamplingParams

    from proxy_vllm import ProxyLLM

    llm = ProxyLLM(
        model=str(model_path("base")),
        antiexpert=str(model_path("antiexpert")),
        alpha=alpha,
        enable_lora=True,
        max_loras=len(ADAPTERS),
        lora_modules={name: str(adapter_path(name)) for name in ADAPTERS},
        **engine_args(),
    )
    ways = (NO_ADAPTER, *ADAPTERS)
    outputs = llm.generate(
        [prompt for prompt in prompts for _ in ways],
        SamplingParams(temperature=0.0, max_tokens=MAX_ANSWER_TOKENS),
        lora_request=[llm.adapters.get(way) for _ in prompts for way in ways],
        use_tqdm=False,
    )
    texts = [output.outputs[0].text for output in outputs]
    return {way: texts[i :: len(ways)] for i, way in enumerate(ways)}


def in_child(run: Callable[..., Any], system: str, prompts: Sequence[str], alpha: float) -> Any:
    """`answer` or `answer_each_way` in a process that ends with it.

    Its messages go to stderr where the user set `VLLM_LOGGING_LEVEL`; else only the last of them,
    when it fails. Raises `UserError` when it does.
    """
    # A second process for the engine would gain nothing here, and import vLLM once more.
    env = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", **os.environ}
    try:
        with ChildProcess(env, quiet="VLLM_LOGGING_LEVEL" not in os.environ) as child:
            return child(run, system, prompts, alpha)
    except ChildFailed as error:
        print(error, file=sys.stderr)
        raise UserError(
            f"{SYSTEMS.get(system, system)} did not run through vLLM: its last messages are above,"
            " VLLM_LOGGING_LEVEL=DEBUG shows all"
        ) from None


def run_demo(problems: Sequence[Problem], alpha: float, say: Callable[[str], None]) -> Report:
    """All systems on the same problems, one after the other; `say` hears which one runs."""
    for role in ROLES:
        model_path(role)
    for name in ADAPTERS:
        adapter_path(name)
    prompts = [problem.prompt for problem in problems]
    answers = {}
    for system, label in SYSTEMS.items():
        say(label)
        answers[system] = in_child(answer, system, prompts, alpha)
    say(SWITCHING)
    return Report(problems, answers, alpha, in_child(answer_each_way, SWITCHING, prompts, alpha))
