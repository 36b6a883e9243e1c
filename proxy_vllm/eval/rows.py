"""The systems that are compared: base, expert and proxy from one engine, the tuned model alone.

Alpha 0 is the base exactly, and ``proxy_member`` the expert. The tuned model is none of the trio,
and gets an engine of its own afterwards, in a process that gives its memory back.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

from proxy_vllm.demo.child import ChildFailed, ChildProcess
from proxy_vllm.errors import UserError
from proxy_vllm.eval.harness import HarnessOptions, Outcome, evaluate
from proxy_vllm.eval.vllm_name import vllm_by_name

# Engine arguments that describe the base's files, and are no good for another model.
_OF_THE_BASE = {
    *("model", "tokenizer", "tokenizer_revision", "revision", "code_revision", "quantization"),
    *("hf_overrides", "hf_config_path", "generation_config", "override_generation_config"),
    *("additional_config", "served_model_name", "speculative_config", "load_format"),
}


def alone_arguments(engine: Any, model: str, own: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the harness's ``vllm`` model for one model by itself.

    Args:
        engine: vLLM's ``EngineArgs`` of the trio; what the user changed and is not about the base's
            files is kept.
        model: folder or hub name.
        own: ``vllm.config.ModelConfig`` fields of this model alone.
    """
    import dataclasses

    from proxy_vllm.engine_args import cpu_kv_cache

    # With the same model, since vLLM looks for its default one where the hub is switched off.
    defaults = type(engine)(model=engine.model)
    kept = {
        f.name: getattr(engine, f.name)
        for f in dataclasses.fields(engine)
        if f.name not in _OF_THE_BASE and getattr(engine, f.name) != getattr(defaults, f.name)
    }
    kept |= own
    return {**kept, **cpu_kv_cache(kept), "pretrained": model}


def trio(
    arguments: dict[str, Any],
    alphas: Sequence[float],
    members: Sequence[str],
    options: HarnessOptions,
) -> list[Outcome]:
    """Outcomes of the trio at each alpha and of members alone, in their order; in this process."""
    from proxy_vllm.eval.model import ProxyVLLM

    own = {"pretrained": arguments["model"], "batch_size": options.batch_size}
    rest = {name: value for name, value in arguments.items() if name != "model"}
    model = ProxyVLLM(**rest, **own)
    outcomes = []
    for alpha in alphas:
        model.alpha = alpha
        outcomes.append(evaluate(model, options))
    for member in members:
        model.ask_alone(member)
        outcomes.append(evaluate(model, options))
    return outcomes


def alone(arguments: dict[str, Any], options: HarnessOptions) -> Outcome:
    """The outcome of one model by itself, through the harness's own vLLM model."""
    from proxy_vllm.eval.model import GreedyVLLM

    with vllm_by_name():
        model = GreedyVLLM(**arguments, batch_size=options.batch_size)
    return evaluate(model, options)


def in_child(function: Callable[..., Any], *args: Any) -> Any:
    """Call in a process that ends with it; its progress goes to standard error.

    Raises:
        UserError: the user can mend it.
        Exception: what else the call raised.
    """
    env = {"VLLM_LOGGING_LEVEL": "ERROR", "LMEVAL_LOG_LEVEL": "WARNING", **os.environ}
    env.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    try:
        with ChildProcess(env, quiet=False) as child:
            return child(function, *args)
    except ChildFailed as error:
        cause = error.__cause__
        if isinstance(cause, Exception):
            raise cause from None
        raise UserError(f"an engine ended: {error}") from None
