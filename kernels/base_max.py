"""The base's largest logit, against which tokens are plausible or not (`reference.plausible`)."""

from vllm.triton_utils import tl, triton


@triton.jit
def base_max_kernel(
    base_ptr,  # [B, V]
    base_stride,
    expert_ptr,
    expert_stride,
    antiexpert_ptr,
    antiexpert_stride,
    alpha_ptr,
    log_beta_ptr,
    base_max_ptr,  # [B, num_tiles] float32
    num_cols,
    num_shared,
    num_named,
    TILE: tl.constexpr,
):
    """The base's largest logit in each tile among tokens that the formula can draw.

    Only of rows with a log_beta that are steered. The small members are read where the base's
    largest is, and whole where one of them forbids that token.
    """
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    if (tl.load(log_beta_ptr + row) == float("-inf")) | (tl.load(alpha_ptr + row) == 0.0):
        return
    cols = tile * TILE + tl.arange(0, TILE)
    base = tl.load(
        base_ptr + row * base_stride + cols,
        mask=cols < tl.minimum(num_cols, num_named),
        other=float("-inf"),
    ).to(tl.float32)
    base = tl.where(base == base, base, float("-inf"))
    largest, index = tl.max(base, axis=0, return_indices=True)
    col = tile * TILE + index
    if col < num_shared:
        expert = tl.load(expert_ptr + row * expert_stride + col).to(tl.float32)
        antiexpert = tl.load(antiexpert_ptr + row * antiexpert_stride + col).to(tl.float32)
        drawable = (tl.abs(expert) < float("inf")) & (tl.abs(antiexpert) < float("inf"))
        if drawable == 0:
            shared = cols < num_shared
            experts = tl.load(expert_ptr + row * expert_stride + cols, mask=shared, other=0.0)
            antiexperts = tl.load(
                antiexpert_ptr + row * antiexpert_stride + cols, mask=shared, other=0.0
            )
            kept = tl.abs(experts.to(tl.float32)) < float("inf")
            kept = kept & (tl.abs(antiexperts.to(tl.float32)) < float("inf"))
            largest = tl.max(tl.where(kept, base, float("-inf")), axis=0)
    tl.store(base_max_ptr + row * tl.num_programs(1) + tile, largest)
