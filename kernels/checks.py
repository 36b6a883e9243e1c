"""Checks of tensor arguments that read only metadata: no host synchronisation, safe in capture."""

import torch

LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _fail(name: str, problem: str) -> None:
    raise ValueError(f"{name}: {problem}")


def check_logits(
    base: torch.Tensor,  # [B, V]
    expert: torch.Tensor,  # [B, V_e]
    antiexpert: torch.Tensor,  # [B, V_a]
) -> None:
    """Raises ValueError naming the argument whose shape, dtype, device or stride is wrong."""
    for name, tensor in (("base", base), ("expert", expert), ("antiexpert", antiexpert)):
        if not isinstance(tensor, torch.Tensor):
            _fail(name, f"expected a tensor, got {type(tensor).__name__}")
        if tensor.dim() != 2:
            _fail(name, f"expected shape [B, V], got {list(tensor.shape)}")
        if tensor.shape[1] == 0:
            _fail(name, "the vocabulary is empty (V = 0)")
        if tensor.dtype not in LOGIT_DTYPES:
            _fail(name, f"expected float32, bfloat16 or float16, got {tensor.dtype}")
        if tensor.shape[0] != base.shape[0]:
            _fail(name, f"has {tensor.shape[0]} rows where base has {base.shape[0]}")
        if tensor.device != base.device:
            _fail(name, f"is on {tensor.device} where base is on {base.device}")
        # PyTorch itself refuses negative strides; a size-1 dimension may carry any stride.
        if tensor.shape[1] > 1 and tensor.stride(1) != 1:
            _fail(name, f"the vocabulary must have stride 1, got {tensor.stride(1)}")
        if tensor.shape[0] > 1 and tensor.stride(0) < 0:
            _fail(name, f"negative row stride {tensor.stride(0)}")


def check_vector(
    name: str,
    tensor: torch.Tensor | None,
    dtype: torch.dtype,
    device: torch.device,
    size: int,
    optional: bool = False,
) -> None:
    """Raises ValueError naming `name` unless it is a contiguous vector of `size` entries."""
    if tensor is None:
        if not optional:
            _fail(name, "is required")
        return
    if not isinstance(tensor, torch.Tensor):
        _fail(name, f"expected a tensor, got {type(tensor).__name__}")
    if tensor.dim() != 1:
        _fail(name, f"expected one dimension, got shape {list(tensor.shape)}")
    if tensor.dtype != dtype:
        _fail(name, f"expected {str(dtype).removeprefix('torch.')}, got {tensor.dtype}")
    if tensor.device != device:
        _fail(name, f"is on {tensor.device} where base is on {device}")
    if tensor.shape[0] > 1 and tensor.stride(0) != 1:
        _fail(name, f"must be contiguous, got stride {tensor.stride(0)}")
    if tensor.shape[0] != size:
        _fail(name, f"expected {size} entries, got {tensor.shape[0]}")
