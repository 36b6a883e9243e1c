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
    "num_shared_columns",
    "require_triton",
    "row_filters",
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
def combine_tile(
    base_row,  # pointer to base[row, 0]
    expert_row,
    antiexpert_row,
    cols,  # [TILE] int
    vocab_size,
    num_shared,  # columns that all three members have
    alpha,  # float32 scalar
):
    """base + alpha * (expert - antiexpert) in float32 for one tile of one row.

    Past vocab_size: -inf. See reference.combine for what infinities and NaN do.
    """
    base = tl.load(base_row + cols, mask=cols < vocab_size, other=float("-inf")).to(tl.float32)
    logits = base
    if alpha != 0.0:
        shared = cols < num_shared
        expert = tl.load(expert_row + cols, mask=shared, other=0.0).to(tl.float32)
        antiexpert = tl.load(antiexpert_row + cols, mask=shared, other=0.0).to(tl.float32)
        unknown = (tl.abs(expert) == float("inf")) | (tl.abs(antiexpert) == float("inf"))
        shift = tl.where(unknown, 0.0, expert - antiexpert)
        # An explicit fma: left to the compiler, the rounding would differ between kernels.
        logits = tl.where(base == float("-inf"), base, tl.fma(shift, alpha, base))
    return logits


@triton.jit
def unscaled_tile(
    base_row,
    expert_row,
    antiexpert_row,
    cols,
    vocab_size,
    num_shared,
    alpha,
):
    """combine_tile with NaN made -inf, so that no reduction ever meets one."""
    logits = combine_tile(base_row, expert_row, antiexpert_row, cols, vocab_size, num_shared, alpha)
    return tl.where(logits == logits, logits, float("-inf"))


def num_shared_columns(base: torch.Tensor, expert: torch.Tensor, antiexpert: torch.Tensor) -> int:
    """Columns of the base that both small members have."""
    return min(base.shape[1], expert.shape[1], antiexpert.shape[1])
