"""Build and load the three members with vLLM's own code, and account for their memory."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
import torch.nn as nn
from vllm.compilation.backends import set_model_tag
from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.model_executor.model_loader.weight_tying import maybe_retie_word_embeddings
from vllm.v1.attention.backend import AttentionBackend, subclass_attention_backend

from proxy_vllm.composite.member_configs import view
from proxy_vllm.config import ROLES
from proxy_vllm.errors import UserError, one_line

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheSpec

# Attributes of an attention layer's implementation by which metadata may differ.
_ATTENTION_KIND = ("num_heads", "num_kv_heads", "head_size", "logits_soft_cap")


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


def give_own_attention(members: dict[str, nn.Module], configs: dict[str, VllmConfig]) -> None:
    """Have the small members' attention metadata made for their own dtype, heads and head size.

    vLLM's builders of metadata take what they need to know of a model from the engine's
    configuration, which is the base's; a processor's kernels then abort on another dtype, and
    others size their buffers by the wrong heads. Members that agree in all of it share a builder.
    """
    own: dict[tuple, type[AttentionBackend]] = {}
    for role in ROLES[1:]:
        config = configs[role].model_config
        for layer in attention_layers(members[role]):
            impl = layer.impl
            key = (
                layer.attn_backend,
                config.dtype,
                *(getattr(impl, name, None) for name in _ATTENTION_KIND),
            )
            if key not in own:
                own[key] = _backend_of(role, layer.attn_backend, config)
            layer.attn_backend = own[key]


def separate_attention(members: dict[str, nn.Module]) -> None:
    """Give each member attention metadata of its own: models read prompts of their own.

    vLLM builds metadata once for all layers with one backend and one cache shape, and some builders
    keep buffers. It tells groups apart by the backend's class.
    """
    for role, member in members.items():
        own: dict[type, type] = {}
        for layer in attention_layers(member):
            backend = layer.attn_backend
            if backend not in own:
                own[backend] = subclass_attention_backend(
                    f"Proxy_{role}_", backend, backend.get_builder_cls()
                )
            layer.attn_backend = own[backend]


def attention_layers(member: nn.Module) -> list[Attention]:
    return [module for module in member.modules() if isinstance(module, Attention)]


def _backend_of(
    role: str, backend: type[AttentionBackend], model_config: ModelConfig
) -> type[AttentionBackend]:
    """The backend, with metadata made for a model of ``model_config``."""

    class MemberBuilder(backend.get_builder_cls()):  # type: ignore[misc]
        def __init__(self, kv_cache_spec, layer_names, vllm_config, device, **kwargs) -> None:
            own = view(vllm_config, model_config)
            super().__init__(kv_cache_spec, layer_names, own, device, **kwargs)

        @classmethod
        def get_cudagraph_support(cls, vllm_config, kv_cache_spec):
            own = view(vllm_config, model_config)
            return super().get_cudagraph_support(own, kv_cache_spec)

    return subclass_attention_backend(f"{role}_", backend, MemberBuilder)


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


def retie_embeddings(member: nn.Module, member_config: VllmConfig) -> None:
    """Share an output head that equals the input embeddings, as vLLM does for a single model.

    After the first load only: when weights are loaded again, vLLM keeps layers without storage
    (on ``meta``) until the whole composite is done, and a shared head stays shared.
    """
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
