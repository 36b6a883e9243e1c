"""Device functions that every kernel of this folder shares.

The Gumbel noise is vLLM's own (``vllm.v1.worker.gpu.sample.gumbel``), imported and never copied, so
that a token drawn here equals the one vLLM draws from the same logits, seed and position.
"""

import os

import torch
from vllm.triton_utils import HAS_TRITON, tl, triton
from vllm.v1.worker.gpu.sample.gumbel import gumbel_noised_argmax, murmur3_hash32

__all__ = [
    "INTERPRETED",
    "combine_tile",
    "float_key",
    "gumbel_noised_argmax",
    "key_float",
    "murmur3_hash32",
    "require_triton",
    "row_filters",
    "row_max",
    "unscaled_tile",
]

# Triton's interpreter runs the kernels on the CPU, one program after another.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")

# Largest finite float32.
_FLT_MAX = tl.constexpr(3.4028234663852886e38)


def require_triton(tensor: torch.Tensor, name: str = "base") -> None:
    """Raises where kernels cannot run on a tensor, with whose device the other arguments agree.

    ValueError names it where it is on a CPU and the interpreter is off; RuntimeError says that vLLM
    found no Triton (it has placeholders then).
    """
    if not INTERPRETED and tensor.device.type == "cpu":
        raise ValueError(
            f"{name}: is on cpu, and the sampling kernels need a GPU (or TRITON_INTERPRET=1, with "
            "a 'cpu' entry in triton.backends, to run in Triton's interpreter)"
        )
    if not HAS_TRITON:
        raise RuntimeError(
            "the sampling kernels need Triton with a GPU, or TRITON_INTERPRET=1 on a CPU with a "
            "'cpu' entry in triton.backends; vLLM found neither at import"
        )


@triton.jit
def row_filters(row, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, vocab_size):
    """(temperature, top_k or 0, top_p or 1, min_p or 0); a greedy row has no filter."""
    temperature = tl.load(temperature_ptr + row)
    random = temperature != 0.0
    top_k = tl.load(top_k_ptr + row, mask=random, other=0)
    top_k = tl.where((top_k > 0) & (top_k < vocab_size), top_k, 0)
    top_p = tl.load(top_p_ptr + row, mask=random, other=1.0)
    min_p = tl.load(min_p_ptr + row, mask=random, other=0.0)
    return temperature, top_k, top_p, min_p


@triton.jit
def float_key(value):
    """int64 that orders float32 scalars as their values do; both zeros share one key."""
    bits = tl.where(value == 0.0, 0.0, value).to(tl.float32).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def key_float(key):
    """Inverse of float_key."""
    bits = key.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def row_max(tile_max_ptr, row, num_tiles, TILES: tl.constexpr):
    tiles = tl.arange(0, TILES)
    values = tl.load(
        tile_max_ptr + row * num_tiles + tiles, mask=tiles < num_tiles, other=float("-inf")
    )
    return tl.max(values, axis=0)


@triton.jit
def combine_tile(
    row,  # int64
    cols,  # [TILE] int
    base_ptr,  # [B, V]
    base_stride,
    expert_ptr,
    expert_stride,
    antiexpert_ptr,
    antiexpert_stride,
    missing_ptr,  # [B] float32, shift of what a small member lacks; None where they lack nothing
    alpha_ptr,  # [B] float32
    num_cols,
    num_shared,  # columns that all three members have
    num_named,  # columns that a tokenizer names
    log_beta_ptr,  # [B] float32, -inf: no row loses implausible tokens; None: no row does
    drop_ptr,  # [B] float32, taken off the logits of implausible tokens; None: they are forbidden
    base_max_ptr,  # [B, num_base_max] float32, read of rows with a log_beta: see base_max_kernel
    num_base_max,
    BASE_MAX: tl.constexpr,
):
    """base + alpha * (expert - antiexpert) in float32 for one tile of one row.

    Past num_cols: -inf. See `reference.combine` for the columns past the other two counts, and for
    what infinities and NaN do, and `reference.plausible` for what a log_beta leaves out.
    """
    base = tl.load(base_ptr + row * base_stride + cols, mask=cols < num_cols, other=float("-inf"))
    base = base.to(tl.float32)
    logits = base
    alpha = tl.load(alpha_ptr + row)
    if alpha != 0.0:
        shared = cols < num_shared
        missing = 0.0
        if missing_ptr is not None:
            missing = tl.load(missing_ptr + row)
        expert = tl.load(expert_ptr + row * expert_stride + cols, mask=shared, other=0.0)
        antiexpert = tl.load(
            antiexpert_ptr + row * antiexpert_stride + cols, mask=shared, other=0.0
        )
        expert = tl.where(shared, expert.to(tl.float32), missing)
        antiexpert = antiexpert.to(tl.float32)
        forbidden = (tl.abs(expert) == float("inf")) | (tl.abs(antiexpert) == float("inf"))
        forbidden = forbidden | (base == float("-inf")) | (cols >= num_named)
        # An explicit fma: left to the compiler, the rounding would differ between kernels.
        shifted = tl.fma(expert - antiexpert, alpha, base)
        logits = tl.where(forbidden, float("-inf"), shifted)
        if log_beta_ptr is not None:
            log_beta = tl.load(log_beta_ptr + row)
            if log_beta > float("-inf"):
                drop = float("inf")
                if drop_ptr is not None:
                    drop = tl.load(drop_ptr + row)
                floor = row_max(base_max_ptr, row, num_base_max, BASE_MAX) + log_beta
                logits = tl.where(base < floor, logits - drop, logits)
    return logits


@triton.jit
def unscaled_tile(
    row,
    cols,
    base_ptr,
    base_stride,
    expert_ptr,
    expert_stride,
    antiexpert_ptr,
    antiexpert_stride,
    missing_ptr,
    alpha_ptr,
    num_cols,
    num_shared,
    num_named,
    log_beta_ptr,
    base_max_ptr,
    num_base_max,
    BASE_MAX: tl.constexpr,
):
    """combine_tile with NaN made -inf, so that no reduction ever meets one."""
    logits = combine_tile(
        row, cols, base_ptr, base_stride, expert_ptr, expert_stride, antiexpert_ptr,
        antiexpert_stride, missing_ptr, alpha_ptr, num_cols, num_shared, num_named, log_beta_ptr,
        None, base_max_ptr, num_base_max, BASE_MAX,
    )  # fmt: skip
    return tl.where(logits == logits, logits, float("-inf"))
