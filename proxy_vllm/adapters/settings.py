"""Adapters in an engine's arguments: what they exclude, and whether each can run."""

from typing import TYPE_CHECKING, Any

from proxy_vllm.adapters.check import LM_HEAD, AdapterRules
from proxy_vllm.config import ProxyConfig
from proxy_vllm.errors import UserError

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig
    from vllm.lora.request import LoRARequest


def named_adapters(kwargs: dict[str, Any]) -> dict[str, str]:
    """Adapters that are named at start-up: path by name.

    Args:
        kwargs: engine arguments; ``lora_modules`` is a dictionary, or vLLM's list of the option.
    """
    given = kwargs.get("lora_modules") or {}
    if isinstance(given, dict):
        return {str(name): str(path) for name, path in given.items()}
    return {module.name: module.path for module in given}


def requests_of(adapters: dict[str, str]) -> "dict[str, LoRARequest]":
    """vLLM's request for each of these adapters, by name."""
    from vllm.lora.request import LoRARequest

    return {
        name: LoRARequest(name, number, path)
        for number, (name, path) in enumerate(adapters.items(), start=1)
    }


def check_adapters(
    kwargs: dict[str, Any], proxy: ProxyConfig, configs: "dict[str, ModelConfig]"
) -> None:
    """Refuse adapters, and options beside them, that cannot run.

    Raises:
        UserError: naming the option, or the adapter and what it holds.
    """
    adapters = named_adapters(kwargs)
    if not kwargs.get("enable_lora"):
        if adapters:
            raise UserError("--lora-modules needs --enable-lora")
        return
    if excluded := _excluded(kwargs, proxy):
        raise UserError(f"--enable-lora: {excluded}")
    rules = rules_of(kwargs, configs["expert"], bool(proxy.moved_tokens("expert")))
    for name, path in adapters.items():
        rules.check(name, path)


def rules_of(kwargs: dict[str, Any], expert: "ModelConfig", renumbered: bool) -> "AdapterRules":
    """What adapters of the expert may change, by an engine's arguments."""
    from vllm.config.lora import LoRAConfig
    from vllm.model_executor.models import ModelRegistry, supports_lora

    kind, name = ModelRegistry.resolve_model_cls(expert.architectures, expert)
    if not supports_lora(kind):
        raise UserError(
            f"--enable-lora: vLLM adapts no {name}, which {expert.model!r} is: merge the adapter"
            " into the small model, and give the result as --expert"
        )
    given = {name: kwargs.get(field) for field, name in _LIMITS.items()}
    limits = LoRAConfig(**{name: value for name, value in given.items() if value is not None})
    return AdapterRules.of(expert, limits, renumbered)


def rules_of_engine(vllm_config: "VllmConfig") -> "AdapterRules":
    """What adapters of the expert may change, by an engine's configuration."""
    from proxy_vllm.composite.member_configs import member_model_config

    proxy = ProxyConfig.from_vllm_config(vllm_config)
    expert = member_model_config("expert", proxy, vllm_config.model_config)
    assert vllm_config.lora_config is not None
    return AdapterRules.of(expert, vllm_config.lora_config, bool(proxy.moved_tokens("expert")))


# vLLM's engine arguments, and the fields of its configuration that they become.
_LIMITS = {"max_lora_rank": "max_lora_rank", "lora_target_modules": "target_modules"}


def _excluded(kwargs: dict[str, Any], proxy: ProxyConfig) -> str | None:
    """What cannot go with adapters among an engine's arguments."""
    from vllm.platforms import current_platform

    if proxy.remote_base is not None:
        return "a base elsewhere (--base-url) goes with no adapters; leave one of them out"
    if proxy.takes_own_prompts:
        return (
            "models with prompts of their own (--own-prompts, or a chat template of a small model)"
            " read them in another order than adapters are laid out; leave one of them out"
        )
    if kwargs.get("fully_sharded_loras") and current_platform.is_cpu():
        return "vLLM's --fully-sharded-loras mixes requests' adapters on a CPU; leave it out"
    if "lm_head" in (kwargs.get("lora_target_modules") or ()):
        return f"--lora-target-modules names lm_head, {LM_HEAD}"
    return None
