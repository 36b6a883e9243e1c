"""Rotary embedding on a CPU for models that give it queries by head.

vLLM's CPU kernel (0.32.0) takes queries ``[T, heads * size]`` or ``[T, heads, size]``, and is
wrong for the second form with more than one head: DeepSeek's and LFM2's answers then differ alone
and in a batch. Models that are compiled do not use it.
"""

from functools import partial

import torch
import torch.nn as nn
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding


def rotate_flat(member: nn.Module) -> None:
    """Give a member's rotary embeddings, where they call the kernel, queries without heads."""
    for module in member.modules():
        if isinstance(module, RotaryEmbedding) and module._forward_method == module.forward_cpu:
            module._forward_method = partial(_rotate, module)


def _rotate(
    module: RotaryEmbedding,
    positions: torch.Tensor,  # [T]
    query: torch.Tensor,  # [T, heads * size] or [T, heads, size]
    key: torch.Tensor | None = None,  # likewise
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if query.dim() == 2 and (key is None or key.dim() == 2):
        return module.forward_cpu(positions, query, key)
    flat = [x if x is None else x.reshape(x.shape[0], -1) for x in (query, key)]
    rotated = module.forward_cpu(positions, *flat)
    # The kernel writes in place, and so do callers expect it. Some are views already, and of one
    # token with other strides, by which PyTorch takes them for an overlap that it cannot copy.
    for given, own in zip((query, key), rotated):
        if given is not None and given.data_ptr() != own.data_ptr():
            given.copy_(own.view(given.shape))
    return query, key
