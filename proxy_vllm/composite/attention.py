"""Layers that keep a cache, of all three members, and the metadata that vLLM makes for them.

vLLM's builders of attention metadata take what they need to know of a model from the engine's
configuration, and vLLM has one builder for all layers with one backend and one shape of cache. A
processor's kernels then abort on another dtype, others size their buffers by the wrong heads, and
some assume that all their layers have one window. vLLM tells builders apart by the backend's class.
"""

import torch.nn as nn
from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.v1.attention.backend import AttentionBackend, subclass_attention_backend

from proxy_vllm.composite.member_configs import view

# Attributes of an attention layer's implementation by which metadata may differ.
_ATTENTION_KIND = ("num_heads", "num_kv_heads", "head_size", "logits_soft_cap")


def cache_layers(member: nn.Module) -> list[AttentionLayerBase]:
    """Attention of every kind, latent attention, and layers with states."""
    return [module for module in member.modules() if isinstance(module, AttentionLayerBase)]


def has_states(model: nn.Module) -> bool:
    """Whether some layer keeps a state instead of keys and values."""
    return any(isinstance(module, MambaBase) for module in model.modules())


def give_own_attention(members: dict[str, nn.Module], configs: dict[str, VllmConfig]) -> None:
    """Have metadata made for each member's own configuration, and for one window at a time.

    Plain attention without a window is the engine's own where the base has it, and small members
    that agree in dtype, heads, head size and soft cap share theirs.
    """
    own: dict[tuple, type[AttentionBackend]] = {}
    for role, member in members.items():
        config = configs[role].model_config
        for layer in cache_layers(member):
            backend, window = layer.get_attn_backend(), getattr(layer, "sliding_window", None)
            plain = type(layer) is Attention
            if role == "base" and plain and window is None:
                continue
            key: tuple = (backend, config.dtype, window)
            if plain and role != "base":
                key += tuple(getattr(layer.impl, name, None) for name in _ATTENTION_KIND)
            else:
                key += (role,)
            if key not in own:
                name = role if window is None else f"{role}_window_{window}"
                own[key] = _backend_of(name, backend, config)
            _set_backend(layer, own[key])


def separate_attention(members: dict[str, nn.Module]) -> None:
    """Give each member attention metadata of its own: models read prompts of their own."""
    for role, member in members.items():
        own: dict[type, type] = {}
        for layer in cache_layers(member):
            backend = layer.get_attn_backend()
            if backend not in own:
                own[backend] = subclass_attention_backend(
                    f"Proxy_{role}_", backend, backend.get_builder_cls()
                )
            _set_backend(layer, own[backend])


def _set_backend(layer: AttentionLayerBase, backend: type[AttentionBackend]) -> None:
    if hasattr(layer, "attn_backend"):
        layer.attn_backend = backend
    if layer.get_attn_backend() is not backend:  # layers with states make theirs when asked
        layer.get_attn_backend = lambda: backend  # type: ignore[method-assign]


def _backend_of(
    name: str, backend: type[AttentionBackend], model_config: ModelConfig
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

    return subclass_attention_backend(f"{name}_", backend, MemberBuilder)
