"""Which small members are the base itself, so that it need not be loaded, run or cached twice."""

import os
from dataclasses import replace
from typing import TYPE_CHECKING

from vllm.logger import init_logger

from proxy_vllm.config import ROLES, ProxyConfig
from proxy_vllm.errors import UserError

if TYPE_CHECKING:
    from vllm.config import ModelConfig

logger = init_logger(f"vllm.{__name__}")

# Fields of vLLM's configuration that decide what is loaded from a checkpoint, and how it is run.
_FIELDS = (
    "revision",
    "code_revision",
    "dtype",
    "quantization",
    "quantization_config",
    "config_format",
    "hf_config_path",
    "trust_remote_code",
    "disable_sliding_window",
    "model_class_overrides",
)


def with_same_weights(
    proxy: ProxyConfig, configs: "dict[str, ModelConfig]", adapted: bool = False
) -> ProxyConfig:
    """``proxy`` with the small members that are another member.

    Args:
        adapted: whether requests bring LoRA adapters of the expert.

    Raises:
        UserError: drafts are asked for, and no small member is there to make them.
    """
    same = dict(proxy.same_weights)
    for role in ROLES[1:]:
        moved = proxy.moved_tokens(role)
        if not moved and is_same_model(configs[role], configs["base"]):
            same[role] = "base"
    if adapted:
        same = _beside_adapters(same, proxy, configs)
    if not same:
        return proxy
    proxy = replace(proxy, same_weights=same)
    for role, source in same.items():
        how = "its weights are loaded once" if proxy.runs(role) else "it is loaded and run once"
        logger.info("The %s is the %s: %s", role, source, how)
    if proxy.expert_drafts and proxy.drafter is None:
        raise UserError(
            "--speculative-tokens: expert and antiexpert are the base itself, which drafts no"
            " faster than it answers; leave the option out"
        )
    return proxy


def _beside_adapters(
    same: dict[str, str], proxy: ProxyConfig, configs: "dict[str, ModelConfig]"
) -> dict[str, str]:
    """What an expert with adapters shares: weights at most, and a mixture of experts nothing.

    vLLM adapts a mixture from inside, and with it every member that has the same one.
    """
    same = {role: source for role, source in same.items() if role != "expert"}
    if proxy.adapters and not configs["expert"].is_moe:
        if "antiexpert" in same:
            same["expert"] = same["antiexpert"]
        else:
            same["antiexpert"] = "expert"
    return same


def is_same_model(a: "ModelConfig", b: "ModelConfig") -> bool:
    """Whether two configurations load the same weights and run them alike."""
    if _place(a.model) != _place(b.model):
        return False
    fields = [name for name in _FIELDS if name != "revision" or not os.path.exists(a.model)]
    if any(getattr(a, name) != getattr(b, name) for name in fields):
        return False
    # What `hf_overrides` changed shows here.
    dicts = [config.hf_config.to_dict() for config in (a, b)]
    for own in dicts:
        own.pop("_name_or_path", None)
    return dicts[0] == dicts[1]


def _place(name: str) -> str:
    return os.path.realpath(name) if os.path.exists(name) else name
