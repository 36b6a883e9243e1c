"""Build and load the three members with vLLM's own code, and account for their memory."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
import torch.nn as nn
from vllm.compilation.backends import set_model_tag
from vllm.config import ModelConfig, VllmConfig, replace
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.model_executor.model_loader.weight_tying import maybe_retie_word_embeddings
from vllm.transformers_utils.config import get_config
from vllm.v1.attention.backend import subclass_attention_backend

from proxy_vllm.config import CONFIG_KEY, ROLES, ProxyConfig
from proxy_vllm.errors import UserError, one_line

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheSpec

# What a small member takes from the base's configuration, unless `expert_args` says otherwise.
_INHERITED = (
    "trust_remote_code",
    "seed",
    "enforce_eager",
    "tokenizer_mode",
    "skip_tokenizer_init",
    "hf_token",
    "config_format",
    "allow_deprecated_quantization",
    "disable_sliding_window",
)


def member_model_config(role: str, proxy: ProxyConfig, base: ModelConfig) -> ModelConfig:
    """vLLM's configuration of the expert or the antiexpert.

    Its dtype is the base's unless the member's arguments name another. Its length limit is its
    own, so that the caller can compare it with the base's.
    """
    args = {name: getattr(base, name) for name in _INHERITED if hasattr(base, name)}
    args["dtype"] = base.dtype
    args.update(proxy.member_args(role))
    return ModelConfig(model=getattr(proxy, role), **args)


def member_vllm_configs(vllm_config: VllmConfig, proxy: ProxyConfig) -> dict[str, VllmConfig]:
    """One ``VllmConfig`` for each role: own model and quantization, everything else shared.

    ``compilation_config`` stays the same object, so all attention layers register in one
    ``static_forward_context`` and vLLM pages the three caches with one block table.

    ``additional_config`` enters the key of vLLM's cache of compiled graphs. A member's graph holds
    its layers' names, so two roles must not share one, though they be the same model; alpha and
    the like are in no graph. The cache also has one folder for the whole engine, named by the base.
    """
    composite = vllm_config.model_config
    own = get_config(
        composite.hf_config_path or composite.model,
        composite.trust_remote_code,
        composite.revision,
        composite.code_revision,
        composite.config_format,
        token=composite.hf_token,
    )
    configs = {
        "base": vllm_config.with_hf_config(
            composite.hf_config, architectures=list(own.architectures or [])
        )
    }
    for role in ROLES[1:]:
        model_config = member_model_config(role, proxy, composite)
        model_config.max_model_len = composite.max_model_len
        configs[role] = replace(
            vllm_config,
            model_config=model_config,
            quant_config=VllmConfig.get_quantization_config(model_config, vllm_config.load_config),
        )
    others = {k: v for k, v in vllm_config.additional_config.items() if k != CONFIG_KEY}
    graphs = {role: config.model_config.compute_hash() for role, config in configs.items()}
    for role, config in configs.items():
        config.additional_config = {**others, CONFIG_KEY: {"role": role, "graphs": graphs}}
    return configs


def build_member(role: str, member_config: VllmConfig, prefix: str) -> nn.Module:
    """Instantiate one member, its layers named ``{prefix}.…``, without weights.

    The compilation tag keeps the members' compiled graphs apart; the base keeps vLLM's own.
    """
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(member_config.model_config.dtype)
    try:
        with nullcontext() if role == "base" else set_model_tag(role):
            return initialize_model(
                member_config, prefix=prefix, model_config=member_config.model_config
            )
    finally:
        torch.set_default_dtype(dtype)


def separate_attention(role: str, member: nn.Module) -> None:
    """Give a member attention metadata of its own.

    vLLM builds metadata once for all layers with one backend and one cache shape, and some builders
    keep buffers; models with different prompts need a builder each. It tells groups apart by the
    backend's class.
    """
    own: dict[type, type] = {}
    for module in member.modules():
        if isinstance(module, Attention):
            backend = module.attn_backend
            if backend not in own:
                own[backend] = subclass_attention_backend(
                    f"Proxy_{role}_", backend, backend.get_builder_cls()
                )
            module.attn_backend = own[backend]


@contextmanager
def naming_member(role: str, member_config: VllmConfig) -> Iterator[None]:
    """Say whose weights do not load: vLLM's errors name tensors, which all three models have."""
    try:
        yield
    except Exception as error:
        name = member_config.model_config.model
        raise UserError(f"{role} {name!r}: its weights do not load: {one_line(error)}") from error


def load_member(role: str, member: nn.Module, member_config: VllmConfig) -> None:
    """Fill a member from its own checkpoint with the loader that the server was told to use."""
    with naming_member(role, member_config):
        loader = get_model_loader(member_config.load_config)
        loader.load_weights(member, member_config.model_config)
        retie_embeddings(member, member_config)


def retie_embeddings(member: nn.Module, member_config: VllmConfig) -> None:
    """Share an output head that equals the input embeddings, as vLLM does for a single model."""
    maybe_retie_word_embeddings(member, member_config.model_config)


def weight_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers on this rank, tied storage counted once."""
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in (*module.parameters(), *module.buffers())
    }
    return sum(storages.values())


def kv_bytes_per_token(specs: "dict[str, KVCacheSpec]") -> dict[str, float]:
    """KV-cache bytes that one token costs each member on this rank, by layer-name prefix."""
    totals = dict.fromkeys(ROLES, 0.0)
    for name, spec in specs.items():
        role = name.split(".", 1)[0]
        if role in totals:
            totals[role] += spec.page_size_bytes / spec.block_size
    return totals
