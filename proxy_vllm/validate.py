"""Checks of a trio before any engine process starts: one clear line instead of a worker's trace."""

import copy
import os
from difflib import get_close_matches
from functools import partial
from math import gcd
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from proxy_vllm.adapters.settings import check_adapters
from proxy_vllm.checks.folders import (
    FILE_FORMATS,
    check_folder,
    check_weights,
    is_folder_name,
    reading,
)
from proxy_vllm.checks.hub import check_hub
from proxy_vllm.checks.tokenizers import check_tokenizers
from proxy_vllm.config import ROLES, ProxyConfig
from proxy_vllm.errors import UserError

if TYPE_CHECKING:
    from vllm.config import ModelConfig

# Load formats by which a model is given tensors of a checkpoint by name.
_FORMATS_OF_TENSORS = (*FILE_FORMATS, "runai_streamer")

# Methods of speculation that need the target's tokens alone.
_DRAFTS_FROM_TOKENS = ("draft_model", "ngram", "suffix")

# Types of models whose attention in vLLM has no way for two ranks to hold one KV head: gpt-oss then
# divides by no heads at all, the others assert. All others have ranks hold copies.
_NO_COPIES_OF_KV_HEADS = ("gpt_oss", "inkling_model", "param2moe")

_MICROBATCHES = "microbatches: vLLM would not cut the rows' alphas along"
# Arguments that a composite of three models cannot honour.
_REFUSED = {
    "enable_dbo": _MICROBATCHES,
    "ubatch_size": _MICROBATCHES,
    "enable_prompt_embeds": "prompt embeddings: three models have three embedding spaces",
    "runner": "",
    "convert": "",
}


def validate_trio(
    kwargs: dict[str, Any], proxy: ProxyConfig
) -> "tuple[dict[str, Any], dict[str, ModelConfig]]":
    """Check that base, expert and antiexpert can run as one model.

    Args:
        kwargs: engine arguments of the base, as for ``vllm.EngineArgs``.
        proxy: the small members.

    Returns:
        The arguments, with ``max_model_len`` set to the shortest member's limit where the user
        named none, and vLLM's configuration of each member.

    Raises:
        UserError: naming the member, the fault, and the way out.
    """
    for name, why in _REFUSED.items():
        value = kwargs.get(name)
        if value in (None, False, 0, "auto") or (name, value) in (
            ("runner", "generate"),
            ("convert", "none"),
        ):
            continue
        raise UserError(
            f"{name}={value!r} is not supported by a proxy-tuned model"
            + (f": {why}" if why else "")
        )
    check_speculation(kwargs.get("speculative_config"))
    load_format = str(kwargs.get("load_format") or "auto")
    check_load_format(load_format)
    check_tokenizer_map(load_format, proxy)
    check_parsers(kwargs)
    check_places(kwargs, proxy)
    warn_of_no_steering(proxy)
    configs = member_configs(kwargs, proxy)
    for role, config in configs.items():
        check_architecture(role, config)
    check_caches(configs, kwargs, proxy)
    check_adapters(kwargs, proxy, configs)
    for role, config in configs.items():
        check_weights(role, config.model, load_format)
    check_tensor_parallel(configs, int(kwargs.get("tensor_parallel_size") or 1))
    if proxy.expert_drafts:
        check_drafted(configs["base"])
    max_model_len = _fit_length(kwargs.get("max_model_len"), configs)
    if not proxy.allow_tokenizer_mismatch and not kwargs.get("skip_tokenizer_init"):
        check_tokenizers(configs, proxy)
    if max_model_len is not None:
        kwargs = {**kwargs, "max_model_len": max_model_len}
    return kwargs, configs


def member_configs(kwargs: dict[str, Any], proxy: ProxyConfig) -> "dict[str, ModelConfig]":
    """vLLM's own configuration of each member, length limits as the checkpoints give them."""
    from vllm import EngineArgs

    from proxy_vllm.composite.member_configs import member_model_config

    known = EngineArgs.__dataclass_fields__
    plain = {k: v for k, v in kwargs.items() if k in known and k != "max_model_len"}
    plain["language_model_only"] = True
    configs = {
        "base": reading(
            "base", str(kwargs["model"]), lambda: EngineArgs(**plain).create_model_config()
        )
    }
    for role in ROLES[1:]:
        if role in proxy.same_weights:
            configs[role] = configs[proxy.same_weights[role]]
            continue
        configs[role] = reading(
            role,
            getattr(proxy, role),
            partial(member_model_config, role, proxy, configs["base"]),
        )
    return configs


def check_architecture(role: str, config: "ModelConfig") -> None:
    """Refuse what is no decoder of text, token after token."""
    kinds = {
        "an encoder-decoder": config.is_encoder_decoder,
        "not a text-generation model": config.runner_type != "generate",
        "a diffusion model": config.is_diffusion,
    }
    for kind, found in kinds.items():
        if found:
            raise UserError(
                f"{role} {config.model!r} is {kind}: proxy_vllm runs decoders of text, which write"
                " one token after the other"
            )


def check_caches(
    configs: "dict[str, ModelConfig]", kwargs: dict[str, Any], proxy: ProxyConfig
) -> None:
    """Refuse members whose caches vLLM cannot keep side by side, or not with these options."""
    from vllm.platforms import current_platform

    from proxy_vllm.composite.engine_config import NO_STATES_OF_OWN_PROMPTS, no_prefix_caching

    def named(role: str) -> str:
        return f"{role} {configs[role].model!r}"

    if proxy.takes_own_prompts and proxy.kv_cache_tables == "several":
        raise UserError(
            "--kv-cache-tables several: models that read prompts of their own need one table, since"
            " blocks are freed by the longest prompt's count"
        )
    latent = [role for role, config in configs.items() if config.use_mla]
    other = [role for role, config in configs.items() if not config.use_mla]
    if latent and other and current_platform.is_cpu():
        raise UserError(
            f"{named(latent[0])} has multi-head latent attention and {named(other[0])} has not:"
            " vLLM's kernels for a CPU want blocks of different sizes for them, and members share"
            " theirs; use members of one kind, or a GPU"
        )
    mixtures = [role for role in configs if configs[role].is_moe]
    if mixtures and "base" not in mixtures and int(kwargs.get("data_parallel_size") or 1) > 1:
        raise UserError(
            f"{named(mixtures[0])} is a mixture of experts and {named('base')} is not: engines of"
            " --data-parallel-size would have to step together, which vLLM decides by the base;"
            " start several servers instead"
        )
    for role, config in configs.items():
        if kwargs.get("enable_prefix_caching") and (reason := no_prefix_caching(config)):
            raise UserError(f"--enable-prefix-caching with the {named(role)}: {reason}")
        states = config.is_hybrid or config.is_attention_free
        if states and proxy.takes_own_prompts and kwargs.get("enable_prefix_caching"):
            raise UserError(
                f"--enable-prefix-caching with the {named(role)}: {NO_STATES_OF_OWN_PROMPTS}"
            )
        if states and (proxy.speculative_tokens or kwargs.get("speculative_config")):
            raise UserError(
                f"{named(role)} keeps states instead of keys and values, from which rejected drafts"
                " cannot be taken back: leave --speculative-tokens and --speculative-config out"
            )
        if states and kwargs.get("disable_hybrid_kv_cache_manager"):
            raise UserError(
                f"{named(role)} keeps states, which need block tables of their own: leave"
                " --disable-hybrid-kv-cache-manager out"
            )


def check_load_format(load_format: str) -> None:
    """Refuse a format that no loader of vLLM's reads; what a loader cannot do, the worker says."""
    from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER as loaders

    if load_format not in loaders:
        raise UserError(
            f"--load-format {load_format} is not known: use auto, safetensors, pt or dummy"
        )


def check_tokenizer_map(load_format: str, proxy: ProxyConfig) -> None:
    """Refuse formats whose loaders fill a model's tables without asking how."""
    if proxy.tokenizer_map and load_format not in (*_FORMATS_OF_TENSORS, "dummy"):
        raise UserError(
            f"--load-format {load_format} reads weights as they are, and --tokenizer-map needs them"
            " in another order: use safetensors"
        )


def check_places(kwargs: dict[str, Any], proxy: ProxyConfig) -> None:
    """Refuse members that are no model's folder, or that the hub does not give."""
    places = {"base": (str(kwargs["model"]), kwargs)}
    for role in ROLES[1:]:
        if role in proxy.same_weights:
            continue
        args = {"hf_token": kwargs.get("hf_token"), **proxy.member_args(role)}
        places[role] = (getattr(proxy, role), args)
    for role, (name, args) in places.items():
        if args.get("hf_config_path"):  # the configuration lies elsewhere
            continue
        if is_folder_name(name):
            check_folder(role, Path(name))
        else:
            check_hub(role, name, args.get("revision"), args.get("hf_token"))


def warn_of_no_steering(proxy: ProxyConfig) -> None:
    """Say that nothing is steered where expert and antiexpert are one model."""
    from vllm.logger import init_logger

    if proxy.adapters or proxy.guided:
        return
    members = (proxy.expert, proxy.antiexpert)
    names = [os.path.realpath(name) if os.path.exists(name) else name for name in members]
    if names[0] == names[1] and proxy.expert_args == proxy.antiexpert_args:
        init_logger(f"vllm.{__name__}").warning(
            "expert and antiexpert are the same model %r: their difference is zero, and every"
            " answer is the base's own, at any alpha",
            proxy.expert,
        )


def check_parsers(kwargs: dict[str, Any]) -> None:
    """Refuse names of parsers that vLLM does not know; plugins may bring more."""
    from vllm.reasoning import ReasoningParserManager
    from vllm.tool_parsers import ToolParserManager

    for option, known in (
        ("tool_call_parser", ToolParserManager.list_registered),
        ("reasoning_parser", ReasoningParserManager.list_registered),
    ):
        name = kwargs.get(option)
        plugin = kwargs.get(option.replace("_call", "") + "_plugin")
        if name and not plugin and name not in known():
            near = get_close_matches(name, known(), n=3, cutoff=0.0)
            flag = "--" + option.replace("_", "-")
            raise UserError(
                f"{flag} {name} is not known to vLLM: {', '.join(near)} come nearest"
                f" (`proxy-vllm serve --help={option.replace('_', '-')}` lists all)"
            )


def check_speculation(speculative_config: Any) -> None:
    """Refuse drafts that are made from the target's hidden states: here there are three."""
    method = speculative_config.get("method") if isinstance(speculative_config, dict) else None
    if method not in (None, *_DRAFTS_FROM_TOKENS):
        raise UserError(
            f"--speculative-config with method {method!r} drafts from one model's hidden states,"
            f" and a proxy-tuned model has three: use {', '.join(_DRAFTS_FROM_TOKENS)}, or"
            " --speculative-tokens"
        )


def check_drafted(base: "ModelConfig") -> None:
    """Refuse drafts beside a base that vLLM takes for a drafter of its own (see engine_args.py)."""
    from vllm.config.speculative import MTPModelTypes, SpeculativeConfig

    kind = SpeculativeConfig.hf_config_override(copy.deepcopy(base.hf_config)).model_type
    marks = [m for m in ("eagle-", "eagle3", "dflash", "dspark") if m in base.model.lower()]
    if kind in get_args(MTPModelTypes) or marks:
        raise UserError(
            f"--speculative-tokens: vLLM would take base {base.model!r} for a drafter, by its"
            f" {'name' if marks else 'architecture'}: leave the option out"
            + (", or name a link to the folder" if marks else "")
        )


def _fit_length(asked: int | str | None, configs: "dict[str, ModelConfig]") -> int | None:
    """The length to serve, or None to leave vLLM's choice; refuse one that a member cannot hold."""
    import vllm.envs

    limits = {role: config.max_model_len for role, config in configs.items()}
    shortest = min(limits, key=lambda role: limits[role])
    if asked in (None, -1, "auto"):
        return limits[shortest] if limits[shortest] < limits["base"] else None
    if int(asked) < 1:
        raise UserError(f"--max-model-len is {asked}: it must be at least 1, or auto")
    # vLLM lets a user stretch the base, and no other model.
    stretched = ("base",) if vllm.envs.VLLM_ALLOW_LONG_MAX_MODEL_LEN else ()
    for role, limit in limits.items():
        if role not in stretched and int(asked) > limit:
            raise UserError(
                f"{role} {configs[role].model!r} holds at most {limit} tokens, but"
                f" --max-model-len is {asked}: pass --max-model-len {limits[shortest]} or less"
            )
    return None


def check_tensor_parallel(configs: "dict[str, ModelConfig]", size: int) -> None:
    """Refuse a tensor-parallel size by which a member's attention heads cannot be divided."""
    for role, config in configs.items():
        name, kind = f"{role} {config.model!r}", config.hf_text_config.model_type
        heads = config.model_arch_config.total_num_attention_heads
        # Layers with a window may have a number of their own.
        windows = getattr(config.hf_text_config, "swa_num_key_value_heads", None)
        for kv_heads in (config.get_total_num_kv_heads(), *([windows] if windows else [])):
            check_heads(name, heads, kv_heads, size, kind)


def check_heads(name: str, heads: int, kv_heads: int, size: int, kind: str | None = None) -> None:
    """Refuse a tensor-parallel size that vLLM cannot cut these heads into.

    Each rank takes a share of the attention heads, and whole KV heads or a copy of one.

    Args:
        kind: ``model_type`` of the model's text configuration.
    """
    if heads % size or (kv_heads % size and size % kv_heads):
        raise UserError(
            f"{name} has {heads} attention heads ({kv_heads} for keys and values), which"
            f" --tensor-parallel-size {size} does not divide"
        )
    if kind in _NO_COPIES_OF_KV_HEADS and size > kv_heads:
        raise UserError(
            f"{name} has too few heads for keys and values ({kv_heads}) for --tensor-parallel-size"
            f" {size}: vLLM gives no two ranks of a model of type {kind} the same one; use at most"
            f" --tensor-parallel-size {gcd(heads, kv_heads)}"
        )
