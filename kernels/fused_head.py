"""Three LM heads, the combination and the draw in one pass over the weights: no [B, V] in memory.

For rows of greedy decoding or plain temperature. Heads are linear, so each tile of the vocabulary
needs three float32 accumulators and nothing else:

    logits = h_base W_base' + alpha * (h_expert W_expert' - h_antiexpert W_antiexpert')

Weights are read through their own pointers and row strides, so tied heads cost no copy. Nothing is
rounded between product and draw, unlike with heads that store bfloat16 logits.
"""

from collections.abc import Sequence
from typing import Any

import torch
from vllm.triton_utils import tl, triton
from vllm.v1.worker.gpu.sample.gumbel import _log1p_neg_stable, murmur3_uniform32

from proxy_vllm.kernels.checks import LOGIT_DTYPES
from proxy_vllm.kernels.columns import Columns
from proxy_vllm.kernels.combine_sample import winner_of_tiles
from proxy_vllm.kernels.row_parameters import RowParameters
from proxy_vllm.kernels.triton_functions import INTERPRETED, require_triton

MEMBERS = ("base", "expert", "antiexpert")


@triton.jit
def _head_tile(
    hidden_ptr,
    hidden_stride,
    weight_ptr,
    weight_stride,
    rows,  # [BLOCK_B]
    num_rows,
    cols,  # [BLOCK_V]
    num_cols,
    hidden_size,
    soft_cap,
    scale,
    BLOCK_B: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_CAP: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """[BLOCK_V, BLOCK_B] float32 logits of one head."""
    logits = tl.zeros((BLOCK_V, BLOCK_B), dtype=tl.float32)
    weight_rows = weight_ptr + cols.to(tl.int64)[:, None] * weight_stride
    hidden_cols = hidden_ptr + rows.to(tl.int64)[None, :] * hidden_stride
    for start in range(0, hidden_size, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = k < hidden_size
        weight = tl.load(
            weight_rows + k[None, :], mask=(cols < num_cols)[:, None] & inside[None, :], other=0.0
        )
        hidden = tl.load(
            hidden_cols + k[:, None], mask=(rows < num_rows)[None, :] & inside[:, None], other=0.0
        )
        if UPCAST:
            # The interpreter multiplies the bits of bfloat16; the products are the same.
            weight, hidden = weight.to(tl.float32), hidden.to(tl.float32)
        logits = tl.dot(weight, hidden, logits, input_precision="ieee")
    if HAS_CAP:
        # tanh(y) = 1 - 2 / (exp(2 y) + 1), without overflow at either end.
        logits = soft_cap * (1.0 - 2.0 / (tl.exp(2.0 * logits / soft_cap) + 1.0))
    # An explicit fma: a plain product may be contracted with the difference that follows, and equal
    # members would no longer cancel.
    return tl.fma(logits, tl.zeros_like(logits) + scale, tl.zeros_like(logits))


@triton.jit(do_not_specialize=["num_rows"])
def head_kernel(
    base_hidden_ptr,  # [B, d_base]
    base_hidden_stride,
    base_weight_ptr,  # [V, d_base]
    base_weight_stride,
    base_size,
    base_cap,
    base_scale,
    expert_hidden_ptr,
    expert_hidden_stride,
    expert_weight_ptr,
    expert_weight_stride,
    expert_size,
    expert_cap,
    expert_scale,
    antiexpert_hidden_ptr,
    antiexpert_hidden_stride,
    antiexpert_weight_ptr,
    antiexpert_weight_stride,
    antiexpert_size,
    antiexpert_cap,
    antiexpert_scale,
    best_score_ptr,  # [B, num_tiles] float32
    best_token_ptr,  # [B, num_tiles] int32
    alpha_ptr,
    temperature_ptr,
    seeds_ptr,
    positions_ptr,
    num_rows,
    num_cols,
    num_named,
    vocab_start,
    BLOCK_B: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BASE_CAP: tl.constexpr,
    SMALL_CAP: tl.constexpr,
    UPCAST: tl.constexpr,
):
    # Batch blocks are neighbours, so that a tile of weights is still in L2 for the next of them.
    rows = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    tile = tl.program_id(1)
    cols = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    real = rows < num_rows
    alpha = tl.load(alpha_ptr + rows, mask=real, other=0.0)
    temperature = tl.load(temperature_ptr + rows, mask=real, other=0.0)
    logits = _head_tile(
        base_hidden_ptr, base_hidden_stride, base_weight_ptr, base_weight_stride, rows, num_rows,
        cols, num_cols, base_size, base_cap, base_scale, BLOCK_B, BLOCK_V, BLOCK_K, BASE_CAP,
        UPCAST,
    )  # fmt: skip
    if tl.max(tl.abs(alpha), axis=0) > 0.0:
        # Two accumulators, not one of the difference: equal members then cancel exactly.
        expert = _head_tile(
            expert_hidden_ptr, expert_hidden_stride, expert_weight_ptr, expert_weight_stride, rows,
            num_rows, cols, num_named, expert_size, expert_cap, expert_scale,
            BLOCK_B, BLOCK_V, BLOCK_K, SMALL_CAP, UPCAST,
        )  # fmt: skip
        antiexpert = _head_tile(
            antiexpert_hidden_ptr, antiexpert_hidden_stride, antiexpert_weight_ptr,
            antiexpert_weight_stride, rows, num_rows, cols, num_named, antiexpert_size,
            antiexpert_cap, antiexpert_scale, BLOCK_B, BLOCK_V, BLOCK_K, SMALL_CAP, UPCAST,
        )  # fmt: skip
        shifted = tl.fma(expert - antiexpert, tl.broadcast_to(alpha[None, :], logits.shape), logits)
        shifted = tl.where((cols < num_named)[:, None], shifted, float("-inf"))
        logits = tl.where((alpha != 0.0)[None, :], shifted, logits)
    logits = tl.where((cols < num_cols)[:, None] & (logits == logits), logits, float("-inf"))
    drawn = (temperature != 0.0)[None, :]
    if tl.max(temperature, axis=0) > 0.0:
        seeds = tl.load(seeds_ptr + rows, mask=real, other=0)
        positions = tl.load(positions_ptr + rows, mask=real, other=0)
        keys = (cols + vocab_start)[:, None]
        u = murmur3_uniform32(seeds[None, :], positions[None, :], keys)
        noise = -tl.log(-_log1p_neg_stable(u))
        divisor = tl.where(temperature != 0.0, temperature, 1.0)[None, :]
        logits = tl.where(drawn, logits / divisor + noise, logits)
    score, index = tl.max(logits, axis=0, return_indices=True)
    out = rows.to(tl.int64) * tl.num_programs(1) + tile
    tl.store(best_score_ptr + out, score, mask=real)
    tl.store(best_token_ptr + out, tile * BLOCK_V + index, mask=real)


def head_weight(lm_head: Any) -> torch.Tensor | None:
    """Weight of a vLLM LM head without quantisation, bias and LoRA; None for any other."""
    from vllm.model_executor.layers.vocab_parallel_embedding import (
        UnquantizedEmbeddingMethod,
        VocabParallelEmbedding,
    )

    if not isinstance(lm_head, VocabParallelEmbedding):
        return None  # LoRA wraps the layer in one of another class
    if not isinstance(lm_head.quant_method, UnquantizedEmbeddingMethod):
        return None
    if getattr(lm_head, "bias", None) is not None:
        return None
    weight = lm_head.weight.data
    return weight if weight.dim() == 2 and weight.dtype in LOGIT_DTYPES else None


def _rows_together(num_rows: int) -> int:
    return min(64, max(16, triton.next_power_of_2(num_rows)))


def head_kinds(max_rows: int) -> list[int]:
    """The smallest batch of each kind that has a compiled kernel of its own."""
    kinds: dict[int, int] = {}
    for rows in range(1, max_rows + 1):
        kinds.setdefault(_rows_together(rows), rows)
    return list(kinds.values())


def supports(
    lm_heads: Sequence[Any],
    soft_caps: Sequence[float | None] = (None, None, None),
) -> bool:
    """Whether fused_head_sample can stand in for these three vLLM heads.

    `soft_caps` are those that will be passed on: a head whose logits are capped outside of it must
    not be fused. Filters, penalties, logprobs and masks need whole rows of logits and exclude the
    fused head row by row; that is the caller's to see.
    """
    weights = [head_weight(head) for head in lm_heads]
    if any(weight is None for weight in weights):
        return False
    return bool(soft_caps[1]) == bool(soft_caps[2])


def fused_head_sample(
    hidden: Sequence[torch.Tensor],  # 3 x [B, d_m]: base, expert, antiexpert
    weights: Sequence[torch.Tensor],  # 3 x [V_m, d_m]
    rows: RowParameters,
    *,
    columns: Columns | None = None,
    soft_caps: Sequence[float | None] = (None, None, None),
    scales: Sequence[float] = (1.0, 1.0, 1.0),
    block_v: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens [B] int64, their scores [B] float32) without materialised logits.

    As proxy_sample without filters on `reference.head_logits` of each member; a head's rows beyond
    the base's V are cut. Hidden state and weight of a member share a dtype (float32, bfloat16 or
    float16); products accumulate in float32, float32 inputs without TF32. `columns` says which
    tokens the rows of the weights are, for shards: merge scores with `sharded.merge_shards`. Either
    both small members have a soft cap or neither. Both must have every named token of the base:
    what else they lack is shifted by sums over all of their logits.

    Raises ValueError naming the argument with a wrong shape, dtype, device or stride, or a filter.
    """
    _check(hidden, weights, soft_caps)
    columns = columns or Columns.of(*(w.T for w in weights))
    if columns.some_missing:
        raise ValueError(
            f"columns: the small members lack {columns.named - columns.shared} named tokens"
        )
    base = hidden[0]
    num_rows = base.shape[0]
    rows.check(num_rows, base.device)
    if rows.filtered or rows.masked:
        raise ValueError("rows: the fused head knows no top_k, top_p, min_p or log_beta")
    if num_rows == 0:
        return base.new_empty(0, dtype=torch.int64), base.new_empty(0, dtype=torch.float32)
    require_triton(base, "hidden")
    num_cols = weights[0].shape[0]
    # Three accumulators must fit: 64 rows spill in float32, and with 4 warps in any dtype.
    short = base.element_size() == 2
    block_b = min(64 if short else 32, _rows_together(num_rows))
    block_v = block_v or 128
    block_k = 64 if short else 32
    num_tiles = triton.cdiv(num_cols, block_v)
    best_score = base.new_empty((num_rows, num_tiles), dtype=torch.float32)
    best_token = base.new_empty((num_rows, num_tiles), dtype=torch.int32)
    members: dict[str, Any] = {}
    for name, h, w, cap, scale in zip(MEMBERS, hidden, weights, soft_caps, scales):
        members |= {
            f"{name}_hidden_ptr": h,
            f"{name}_hidden_stride": h.stride(0),
            f"{name}_weight_ptr": w,
            f"{name}_weight_stride": w.stride(0),
            f"{name}_size": h.shape[1],
            f"{name}_cap": float(cap or 1.0),
            f"{name}_scale": float(scale),
        }
    head_kernel[(triton.cdiv(num_rows, block_b), num_tiles)](
        **members,
        best_score_ptr=best_score,
        best_token_ptr=best_token,
        **rows.pointers("alpha", "temperature", "seeds", "positions"),
        num_rows=num_rows,
        num_cols=num_cols,
        num_named=columns.local(columns.named, num_cols),
        vocab_start=columns.start,
        BLOCK_B=block_b,
        BLOCK_V=block_v,
        BLOCK_K=block_k,
        BASE_CAP=bool(soft_caps[0]),
        SMALL_CAP=bool(soft_caps[1]),
        UPCAST=INTERPRETED,
        num_warps=4 if block_b == 16 else 8,
        num_stages=3,
    )
    return winner_of_tiles(best_score, best_token, columns.start)


def _check(hidden, weights, soft_caps) -> None:
    for name, tensors in (("hidden", hidden), ("weights", weights), ("soft_caps", soft_caps)):
        if len(tensors) != 3:
            raise ValueError(f"{name}: expected base, expert and antiexpert, got {len(tensors)}")
    if bool(soft_caps[1]) != bool(soft_caps[2]):
        raise ValueError("soft_caps: expert and antiexpert must both have one or neither")
    device, num_rows = hidden[0].device, hidden[0].shape[0]
    for member, h, w in zip(MEMBERS, hidden, weights):
        for name, tensor in ((f"hidden ({member})", h), (f"weights ({member})", w)):
            if tensor.dim() != 2 or tensor.shape[1] == 0:
                raise ValueError(f"{name}: expected two dimensions, got {list(tensor.shape)}")
            if tensor.dtype not in LOGIT_DTYPES:
                raise ValueError(f"{name}: expected a 16 or 32 bit float, got {tensor.dtype}")
            if tensor.device != device:
                raise ValueError(f"{name}: is on {tensor.device} where the base's is on {device}")
            if tensor.stride(1) != 1 and tensor.shape[1] > 1:
                raise ValueError(f"{name}: columns must have stride 1, got {tensor.stride(1)}")
        if h.shape[0] != num_rows:
            raise ValueError(f"hidden ({member}): {h.shape[0]} rows where base has {num_rows}")
        if w.shape[0] == 0:
            raise ValueError(f"weights ({member}): the vocabulary is empty (V = 0)")
        if h.shape[1] != w.shape[1] or h.dtype != w.dtype:
            raise ValueError(
                f"weights ({member}): {list(w.shape)} {w.dtype} does not fit "
                f"hidden states {list(h.shape)} {h.dtype}"
            )
