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
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
    min_size: int | None = None,
    size: int | None = None,
    optional: bool = False,
) -> None:
    """Raises ValueError naming `name` unless it is a contiguous vector of one of `dtypes`."""
    if tensor is None:
        if not optional:
            _fail(name, "is required")
        return
    if not isinstance(tensor, torch.Tensor):
        _fail(name, f"expected a tensor, got {type(tensor).__name__}")
    if tensor.dim() != 1:
        _fail(name, f"expected one dimension, got shape {list(tensor.shape)}")
    if tensor.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        _fail(name, f"expected {wanted}, got {tensor.dtype}")
    if tensor.device != device:
        _fail(name, f"is on {tensor.device} where base is on {device}")
    if tensor.shape[0] > 1 and tensor.stride(0) != 1:
        _fail(name, f"must be contiguous, got stride {tensor.stride(0)}")
    if size is not None and tensor.shape[0] != size:
        _fail(name, f"expected {size} entries, got {tensor.shape[0]}")
    if min_size is not None and tensor.shape[0] < min_size:
        _fail(name, f"expected at least {min_size} entries, got {tensor.shape[0]}")


def check_request_state(
    num_rows: int,
    device: torch.device,
    row_to_request: torch.Tensor | None,
    alpha: torch.Tensor | None,
    temperature: torch.Tensor | None = None,
    seeds: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    top_k: torch.Tensor | None = None,
    top_p: torch.Tensor | None = None,
    min_p: torch.Tensor | None = None,
    sampling: bool = False,
) -> None:
    """Per-slot vectors hold one entry a request slot; `positions` one a batch row."""
    integers = (torch.int32, torch.int64)
    check_vector("row_to_request", row_to_request, integers, device, size=num_rows, optional=True)
    # With a map the largest slot is known to the device alone.
    slots = num_rows if row_to_request is None else min(num_rows, 1)
    float32 = (torch.float32,)
    check_vector("alpha", alpha, float32, device, min_size=slots)
    if not sampling:
        return
    check_vector("temperature", temperature, float32, device, min_size=slots)
    check_vector("seeds", seeds, (torch.int64,), device, min_size=slots)
    check_vector("positions", positions, integers, device, size=num_rows)
    check_vector("top_k", top_k, integers, device, min_size=slots, optional=True)
    check_vector("top_p", top_p, float32, device, min_size=slots, optional=True)
    check_vector("min_p", min_p, float32, device, min_size=slots, optional=True)
