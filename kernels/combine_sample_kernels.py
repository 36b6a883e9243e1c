"""Triton kernels of combine_sample.py: tiles of logits to winners, winners to a token.

All run on grids set by shapes alone; what a row needs is read from its entry of `RowParameters`.
"""

from vllm.triton_utils import tl, triton

from proxy_vllm.kernels.threshold_kernels import _FIELDS, min_p_threshold, row_max
from proxy_vllm.kernels.triton_functions import (
    combine_tile,
    gumbel_noised_argmax,
    key_float,
    murmur3_hash32,
    row_filters,
    unscaled_tile,
)

# Of the bound on the noise in _plain_winner: 2**-23 ln 2 and (32 + 127) ln 2.
_BOUND_SLOPE = tl.constexpr(8.262958294867817e-08)
_BOUND_OFFSET = tl.constexpr(110.2104017090313)


@triton.jit
def _exact_winner(
    x, cols, num_cols, vocab_start, seed, position, temperature, USE_FP64: tl.constexpr
):
    """vLLM's argmax over one tile of scaled logits plus noise: (score, index in the tile)."""
    return gumbel_noised_argmax(
        x,
        cols + vocab_start,
        cols < num_cols,
        seed,
        position,
        temperature,
        IS_DRAFTING=False,
        USE_FP64=USE_FP64,
        APPLY_TEMPERATURE=False,
    )


@triton.jit
def _plain_winner(
    logits,  # [TILE] float32 before temperature, no NaN
    cols,
    num_cols,
    vocab_start,
    seed,
    position,
    temperature,
    TILE: tl.constexpr,
):
    """_exact_winner at a third of its arithmetic, which would else exceed the memory traffic.

    A token's score is x + g, with x its scaled logit and g = -log(-log(1 - u)) its noise. Two
    inequalities bound the noise without a logarithm:

        g <= -log(u)                              since -log(1 - u) >= u
        log2(u) >= bits(u) * 2**-23 - 127         bits(u): the float32 u read as an integer

    The second holds because a float 2**e * (1 + m) has the bits (e + 127 + m) * 2**23, and
    log2(1 + m) >= m for m in [0, 1). The hash r gives u = (r + 0.5) * 2**-32, so with
    bits = bits(r + 0.5) and log2(u) = log2(r + 0.5) - 32:

        x + g <= bound + OFFSET,    bound = x - SLOPE * bits,
        SLOPE = 2**-23 ln 2,        OFFSET = (32 + 127) ln 2

    The token with the largest bound gets its exact score s. Every token with bound + OFFSET < s
    loses to it. Where no second token reaches s, it is the winner; otherwise (or where nothing is
    finite) the tile is drawn in full.
    """
    random32 = murmur3_hash32(seed, position, cols + vocab_start)
    bits = (random32.to(tl.float32) + 0.5).to(tl.int32, bitcast=True).to(tl.float32)
    bound = tl.fma(bits, -_BOUND_SLOPE, logits * (1.0 / temperature))
    index = tl.argmax(bound, axis=0)
    lane = tl.arange(0, 1)
    logit = tl.max(tl.where(tl.arange(0, TILE) == index, logits, float("-inf")), axis=0)
    score, _ = _exact_winner(
        (logit + tl.zeros((1,), dtype=tl.float32)) / temperature,
        tl.min(cols, axis=0) + index + lane,
        num_cols,
        vocab_start,
        seed,
        position,
        temperature,
        False,
    )
    # Covers the rounding of the bound, of the product above and of the exact score.
    slack = 1e-4 + 2e-6 * tl.abs(score)
    rivals = tl.sum((bound + _BOUND_OFFSET >= score - slack).to(tl.int32), axis=0)
    if rivals != 1:
        score, index = _exact_winner(
            logits / temperature, cols, num_cols, vocab_start, seed, position, temperature, False
        )
    return score, index


@triton.jit
def combine_kernel(
    base_ptr,  # [B, V]
    base_stride,
    expert_ptr,
    expert_stride,
    antiexpert_ptr,
    antiexpert_stride,
    missing_ptr,  # [B] float32, or None: see combine_tile
    best_score_ptr,  # [B, num_tiles]
    best_token_ptr,  # [B, num_tiles] int32
    x_ptr,  # [B, V] float32, scaled logits of rows with top-k or top-p; these five: if FILTERED
    x_stride,
    best_x_ptr,  # [B, num_tiles] float32, scaled logit of the best token (min-p rows)
    tile_max_ptr,  # [B, num_tiles] float32 (rows with any filter)
    tile_min_ptr,  # [B, num_tiles] float32, over finite logits (top-k and top-p rows)
    alpha_ptr,
    temperature_ptr,
    seeds_ptr,
    positions_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    num_cols,
    num_shared,
    num_named,
    log_beta_ptr,
    base_max_ptr,
    num_base_max,
    vocab_start,
    vocab_size,
    TILE: tl.constexpr,
    USE_FP64: tl.constexpr,
    FILTERED: tl.constexpr,
    BASE_MAX: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    temperature = tl.load(temperature_ptr + row)
    cols = tile * TILE + tl.arange(0, TILE)
    logits = unscaled_tile(
        row, cols, base_ptr, base_stride, expert_ptr, expert_stride, antiexpert_ptr,
        antiexpert_stride, missing_ptr, alpha_ptr, num_cols, num_shared, num_named, log_beta_ptr,
        base_max_ptr, num_base_max, BASE_MAX,
    )  # fmt: skip
    out = row * tl.num_programs(1) + tile
    seed = tl.load(seeds_ptr + row)
    position = tl.load(positions_ptr + row)
    if FILTERED:
        _, top_k, top_p, min_p = row_filters(
            row, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, vocab_size
        )
        if (top_k > 0) | (top_p < 1.0):
            x = logits / temperature
            tl.store(x_ptr + row * x_stride + cols, x, mask=cols < num_cols)
            tl.store(tile_max_ptr + out, tl.max(x, axis=0))
            finite = tl.where(x > float("-inf"), x, float("inf"))
            tl.store(tile_min_ptr + out, tl.min(finite, axis=0))
            return
        if min_p > 0.0:
            x = logits / temperature
            maximum = tl.max(x, axis=0)
            # At most the row's threshold: what the row keeps of this tile is kept here too.
            x = tl.where(x >= min_p_threshold(maximum, min_p), x, float("-inf"))
            score, index = _exact_winner(
                x, cols, num_cols, vocab_start, seed, position, temperature, USE_FP64
            )
            tl.store(tile_max_ptr + out, maximum)
            chosen = tl.where(tl.arange(0, TILE) == index, x, float("-inf"))
            tl.store(best_x_ptr + out, tl.max(chosen, axis=0))
            tl.store(best_score_ptr + out, score)
            tl.store(best_token_ptr + out, tile * TILE + index)
            return
    if temperature == 0.0:
        score, index = tl.max(logits, axis=0, return_indices=True)
        tl.store(best_score_ptr + out, score)
        tl.store(best_token_ptr + out, tile * TILE + index)
        return
    if USE_FP64:
        score, index = _exact_winner(
            logits / temperature, cols, num_cols, vocab_start, seed, position, temperature, True
        )
    else:
        score, index = _plain_winner(
            logits, cols, num_cols, vocab_start, seed, position, temperature, TILE
        )
    tl.store(best_score_ptr + out, score)
    tl.store(best_token_ptr + out, tile * TILE + index)


@triton.jit
def filtered_kernel(
    x_ptr,
    x_stride,
    state_ptr,  # [B, STATE_FIELDS] int64, thresholds
    best_score_ptr,
    best_token_ptr,
    tile_max_ptr,
    temperature_ptr,
    seeds_ptr,
    positions_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    num_cols,
    vocab_start,
    vocab_size,
    TILE: tl.constexpr,
    USE_FP64: tl.constexpr,
):
    """Winners of the tiles of rows with top-k or top-p, among what the thresholds keep."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    temperature, top_k, top_p, _ = row_filters(
        row, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, vocab_size
    )
    if (top_k == 0) & (top_p >= 1.0):
        return
    out = row * tl.num_programs(1) + tile
    threshold = key_float(tl.load(state_ptr + row * _FIELDS))
    if tl.load(tile_max_ptr + out) < threshold:
        tl.store(best_score_ptr + out, float("-inf"))
        tl.store(best_token_ptr + out, tile * TILE)
        return
    cols = tile * TILE + tl.arange(0, TILE)
    x = tl.load(x_ptr + row * x_stride + cols, mask=cols < num_cols, other=float("-inf"))
    x = tl.where(x >= threshold, x, float("-inf"))
    seed = tl.load(seeds_ptr + row)
    position = tl.load(positions_ptr + row)
    score, index = _exact_winner(
        x, cols, num_cols, vocab_start, seed, position, temperature, USE_FP64
    )
    tl.store(best_score_ptr + out, score)
    tl.store(best_token_ptr + out, tile * TILE + index)


@triton.jit
def _load_winners(best_score_ptr, best_token_ptr, row, num_tiles, TILES: tl.constexpr):
    """([TILES] scores, [TILES] tokens) of one row's tiles."""
    tiles = tl.arange(0, TILES)
    at = row * num_tiles + tiles
    scores = tl.load(best_score_ptr + at, mask=tiles < num_tiles, other=float("-inf"))
    tokens = tl.load(best_token_ptr + at, mask=tiles < num_tiles, other=0)
    return scores, tokens


@triton.jit
def _store_winner(scores, tokens, token_ptr, score_ptr, row, vocab_start, TILES: tl.constexpr):
    best, which = tl.max(scores, axis=0, return_indices=True)
    token = tl.sum(tl.where(tl.arange(0, TILES) == which, tokens, 0), axis=0)
    tl.store(token_ptr + row, token.to(tl.int64) + vocab_start)
    tl.store(score_ptr + row, best)


@triton.jit
def winner_kernel(
    best_score_ptr,  # [B, num_tiles]
    best_token_ptr,  # [B, num_tiles] int32
    token_ptr,  # [B] int64
    score_ptr,  # [B] of best_score's dtype
    vocab_start,
    num_tiles,
    TILES: tl.constexpr,
):
    """The best of the tiles' winners, one program a row, where no row has a filter."""
    row = tl.program_id(0).to(tl.int64)
    scores, tokens = _load_winners(best_score_ptr, best_token_ptr, row, num_tiles, TILES)
    _store_winner(scores, tokens, token_ptr, score_ptr, row, vocab_start, TILES)


@triton.jit
def filtered_winner_kernel(
    base_ptr,
    base_stride,
    expert_ptr,
    expert_stride,
    antiexpert_ptr,
    antiexpert_stride,
    missing_ptr,
    best_score_ptr,
    best_token_ptr,
    best_x_ptr,
    tile_max_ptr,
    row_max_ptr,  # [B, num_stats] float32: tile_max, or [B, 1] over all shards
    token_ptr,
    score_ptr,
    alpha_ptr,
    temperature_ptr,
    seeds_ptr,
    positions_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    num_cols,
    num_shared,
    num_named,
    log_beta_ptr,
    base_max_ptr,
    num_base_max,
    vocab_start,
    vocab_size,
    num_tiles,
    num_stats,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    STATS: tl.constexpr,
    USE_FP64: tl.constexpr,
    BASE_MAX: tl.constexpr,
):
    """winner_kernel that first puts the tiles of min-p rows right.

    A tile's winner was drawn among what min-p keeps by the tile's own maximum. If the row's
    threshold drops that winner and keeps another token of the tile, the tile is drawn again.
    """
    row = tl.program_id(0).to(tl.int64)
    scores, tokens = _load_winners(best_score_ptr, best_token_ptr, row, num_tiles, TILES)
    temperature, top_k, top_p, min_p = row_filters(
        row, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, vocab_size
    )
    if (min_p > 0.0) & (top_k == 0) & (top_p >= 1.0):
        threshold = min_p_threshold(row_max(row_max_ptr, row, num_stats, STATS), min_p)
        tiles = tl.arange(0, TILES)
        at = row * num_tiles + tiles
        largest = tl.load(tile_max_ptr + at, mask=tiles < num_tiles, other=float("-inf"))
        winner = tl.load(best_x_ptr + at, mask=tiles < num_tiles, other=float("-inf"))
        scores = tl.where(winner >= threshold, scores, float("-inf"))
        again = ((winner < threshold) & (largest >= threshold)).to(tl.int32)
        seed = tl.load(seeds_ptr + row)
        position = tl.load(positions_ptr + row)
        while tl.max(again, axis=0) > 0:
            tile = tl.argmax(again, axis=0)
            again = tl.where(tiles == tile, 0, again)
            cols = tile * TILE + tl.arange(0, TILE)
            logits = unscaled_tile(
                row, cols, base_ptr, base_stride, expert_ptr, expert_stride, antiexpert_ptr,
                antiexpert_stride, missing_ptr, alpha_ptr, num_cols, num_shared, num_named,
                log_beta_ptr, base_max_ptr, num_base_max, BASE_MAX,
            )  # fmt: skip
            x = logits / temperature
            x = tl.where(x >= threshold, x, float("-inf"))
            score, index = _exact_winner(
                x, cols, num_cols, vocab_start, seed, position, temperature, USE_FP64
            )
            scores = tl.where(tiles == tile, score, scores)
            tokens = tl.where(tiles == tile, tile * TILE + index, tokens)
    _store_winner(scores, tokens, token_ptr, score_ptr, row, vocab_start, TILES)


@triton.jit
def combine_only_kernel(
    base_ptr,
    base_stride,
    expert_ptr,
    expert_stride,
    antiexpert_ptr,
    antiexpert_stride,
    missing_ptr,
    out_ptr,
    out_stride,
    alpha_ptr,
    num_cols,
    num_shared,
    num_named,
    log_beta_ptr,
    drop_ptr,
    base_max_ptr,
    num_base_max,
    TILE: tl.constexpr,
    BASE_MAX: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * TILE + tl.arange(0, TILE)
    logits = combine_tile(
        row, cols, base_ptr, base_stride, expert_ptr, expert_stride, antiexpert_ptr,
        antiexpert_stride, missing_ptr, alpha_ptr, num_cols, num_shared, num_named, log_beta_ptr,
        drop_ptr, base_max_ptr, num_base_max, BASE_MAX,
    )  # fmt: skip
    tl.store(out_ptr + row * out_stride + cols, logits, mask=cols < num_cols)
