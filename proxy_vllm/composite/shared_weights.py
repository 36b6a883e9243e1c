"""A member that has another's weights, and a pass and a KV cache of its own.

Layers that keep a cache are made anew, under the member's own names. All others are the very same
modules, so that whatever loads, quantises or repacks weights does it once for both.
"""

import copy

import torch
import torch.nn as nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

from proxy_vllm.composite.members import build_member
from proxy_vllm.errors import UserError


def build_sharing(
    role: str, member_config: VllmConfig, prefix: str, source: nn.Module
) -> nn.Module:
    """A member with the weights of ``source``, its caches' layers named ``{prefix}.…``.

    Args:
        member_config: of the same model as the source's.
        source: a member that has been built; its weights may come later.

    Raises:
        UserError: a model some of whose weights cannot be shared.
    """
    with torch.device("meta"):
        member = build_member(role, member_config, prefix)
    _share(member, source)
    _forget_unused_layers(member, member_config, prefix)
    tensors = (*member.named_parameters(), *member.named_buffers())
    if left := [name for name, tensor in tensors if tensor.is_meta]:
        raise UserError(
            f"{role}: {type(member).__name__} cannot share its weights between two members:"
            f" {left[0]} is made for each"
        )
    return member


def _share(module: nn.Module, source: nn.Module) -> None:
    """Put the source's tensors and modules into a module, but for the layers that keep a cache."""
    module._parameters.update(source._parameters)
    module._buffers.update(source._buffers)
    if isinstance(module, AttentionLayerBase):
        _take_tensors(module, source)
        if hasattr(module, "impl"):
            _take_tensors(module.impl, source.impl)
    for name, child in module.named_children():
        own = getattr(source, name)
        if any(isinstance(layer, AttentionLayerBase) for layer in child.modules()):
            _share(child, own)
        else:
            setattr(module, name, own)


def own_containers(model: nn.Module) -> None:
    """Give a model containers of its own, so that wrapping a layer there wraps no other member's.

    Those that hold layers with a cache are its own already.
    """
    for name, child in model.named_children():
        if any(isinstance(layer, AttentionLayerBase) for layer in child.modules()):
            own_containers(child)
        elif next(child.children(), None) is not None:
            own = copy.copy(child)
            own._modules = dict(child._modules)
            setattr(model, name, own)
            own_containers(own)


def _take_tensors(holder: object, source: object) -> None:
    """Tensors that are neither parameters nor buffers, such as slopes; made without storage."""
    for name, value in vars(holder).items():
        if isinstance(value, torch.Tensor) and value.is_meta:
            setattr(holder, name, getattr(source, name))


def _forget_unused_layers(member: nn.Module, member_config: VllmConfig, prefix: str) -> None:
    """Take layers out of vLLM's tables that were made and then replaced by the source's."""
    compilation = member_config.compilation_config
    context, used = compilation.static_forward_context, set(map(id, member.modules()))
    for name in [name for name in context if name.startswith(f"{prefix}.")]:
        if id(context[name]) not in used:
            del context[name]
    compilation.static_all_moe_layers[:] = [
        name for name in compilation.static_all_moe_layers if name in context
    ]
