"""Exact top-k and top-p thresholds without sorting, one row spread over many programs.

A stage looks for the largest value t with H(t) >= target, where H(v) sums a weight over the
logits >= v: the weight 1 and the target k for top-k; exp(logit - max) in fixed point and
p * H(everything) for top-p. {logit >= t} is the kept set, ties included.

Each round is one launch over a [rows, tiles] grid. Every program first advances its row's bracket
from the sums of the round before (all programs of a row compute the same), then measures H at
NUM_PIVOTS values inside the bracket for its own tile. The pivots are stored with the sums: the next
launch must compare with the very same floats. Weights are integers, so sums are exact in any order
and the result does not depend on tiling, batch or shards. Tiles without a logit inside the bracket
are not read again. `finish_kernel` ends what the rounds left open.

Thresholds and brackets are float32 values as order-preserving integers (`float_key`).
"""

from vllm.triton_utils import tl, triton

from proxy_vllm.kernels.triton_functions import (
    _FLT_MAX,
    float_key,
    key_float,
    row_filters,
    row_max,
)

# Fields of a row's state: the bracket LO <= t < HI as keys, the target of H, H(HI) or -1 before the
# first measurement, and whether LO is the answer.
STATE_FIELDS = 5
_FIELDS = tl.constexpr(STATE_FIELDS)
_LO = tl.constexpr(0)
_HI = tl.constexpr(1)
_TARGET = tl.constexpr(2)
_ABOVE = tl.constexpr(3)
_DONE = tl.constexpr(4)

# exp(x - max) in units of 2**-44: a row of up to 2**19 - 1 logits sums within int64.
_MASS_UNIT = tl.constexpr(17592186044416.0)
MAX_VOCAB = (1 << 19) - 1
# Below max - 31 a mass is zero units.
_MASS_RANGE = tl.constexpr(31.0)


@triton.jit
def row_min(tile_min_ptr, row, num_tiles, TILES: tl.constexpr):
    tiles = tl.arange(0, TILES)
    values = tl.load(
        tile_min_ptr + row * num_tiles + tiles, mask=tiles < num_tiles, other=float("inf")
    )
    return tl.min(values, axis=0)


@triton.jit
def min_p_threshold(maximum, min_p):
    """Smallest logit that min-p keeps; -inf when it is off."""
    threshold = maximum + tl.log(tl.where(min_p > 0.0, min_p, 1.0))
    return tl.where(min_p > 0.0, threshold, float("-inf"))


@triton.jit
def _first_bracket(lower_key, maximum, minimum, top_k, top_p, MASS: tl.constexpr):
    """State before any measurement; whether H(LO) reaches the target is still to be measured."""
    hi = float_key(maximum) + 1
    if MASS:
        active = top_p < 1.0
        lo = float_key(maximum - _MASS_RANGE)
        target = tl.zeros((), dtype=tl.int64)
    else:
        active = top_k > 0
        lo = float_key(minimum)
        target = top_k.to(tl.int64)
    active = active & (maximum > float("-inf"))
    lo = tl.where(active, tl.minimum(tl.maximum(lo, lower_key), hi - 1), lower_key)
    done = (active & (lo + 1 < hi)) == 0
    return lo, hi, target, tl.full((), -1, dtype=tl.int64), done.to(tl.int64)


@triton.jit
def _pivots(lo, hi, FIRST: tl.constexpr, BY_KEY: tl.constexpr, NUM_PIVOTS: tl.constexpr):
    """[NUM_PIVOTS] float32 values within [lo, hi), evenly spaced in value or in key.

    The first measurement needs H(lo) itself; later ones know it and use inner values alone.
    """
    j = tl.arange(0, NUM_PIVOTS)
    if BY_KEY:
        if FIRST:
            keys = lo + (hi - lo) * j // NUM_PIVOTS
        else:
            keys = lo + (hi - lo) * (j + 1) // (NUM_PIVOTS + 1)
        values = key_float(keys)
    else:
        low = tl.maximum(key_float(lo), -_FLT_MAX)
        high = tl.minimum(key_float(hi - 1), _FLT_MAX)
        if FIRST:
            part = j.to(tl.float32) / NUM_PIVOTS
        else:
            part = (j + 1).to(tl.float32) / (NUM_PIVOTS + 1)
        values = tl.minimum(tl.maximum(low * (1.0 - part) + high * part, low), high)
    return values


@triton.jit
def _advance(
    lo,
    hi,
    target,
    above,
    pivots,  # [NUM_PIVOTS] float32
    totals,  # [NUM_PIVOTS] int64, weight of the row's logits in [pivot, hi)
    smallest,  # smallest and largest logit of the row in [lo, hi)
    largest,
    top_p,
    MASS: tl.constexpr,
):
    """The bracket after a measurement. Only for rows that are not done."""
    if MASS:
        # The lowest pivot of the first measurement is the bracket's lower end.
        everything = tl.max(totals, axis=0).to(tl.float64)
        share = tl.ceil(top_p.to(tl.float64) * everything).to(tl.int64)
        target = tl.where(above < 0, share, target)
    above = tl.maximum(above, 0)
    totals += above
    enough = totals >= target
    keys = float_key(pivots)
    at_lo = tl.min(tl.where(enough, totals, 0x7FFFFFFFFFFFFFFF), axis=0)
    above = tl.maximum(above, tl.max(tl.where(enough, 0, totals), axis=0))
    # Where top-k asks for more logits than min-p left, no pivot is enough, and LO keeps them all.
    lo = tl.maximum(lo, tl.max(tl.where(enough, keys, lo), axis=0))
    hi = tl.minimum(hi, tl.min(tl.where(enough, hi, keys), axis=0))
    # No logit lies between the bracket's ends and the outermost logits inside it.
    found = smallest <= largest
    lo = tl.where(found, tl.maximum(lo, float_key(smallest)), lo)
    hi = tl.where(found, tl.minimum(hi, float_key(largest) + 1), hi)
    finished = lo + 1 >= hi
    if not MASS:
        finished = finished | (at_lo == target)
    return lo, hi, target, above, finished.to(tl.int64)


@triton.jit
def _measure(x, pivots, lo, hi, maximum, MASS: tl.constexpr):
    """Weights in [pivot, hi), smallest and largest logit in [lo, hi), over one tile."""
    inside = (x >= key_float(lo)) & (x <= key_float(hi - 1))
    if MASS:
        mass = tl.where(x == maximum, 1.0, tl.exp(x - maximum))
        weight = tl.where(inside, (mass * _MASS_UNIT).to(tl.int64), 0)
    else:
        weight = inside.to(tl.int32)
    above = x[None, :] >= pivots[:, None]
    totals = tl.sum(tl.where(above, weight[None, :], 0), axis=1).to(tl.int64)
    smallest = tl.min(tl.where(inside, x, float("inf")), axis=0)
    largest = tl.max(tl.where(inside, x, float("-inf")), axis=0)
    return totals, smallest, largest


@triton.jit
def _load_state(state_ptr, row):
    field = state_ptr + row * _FIELDS
    return (
        tl.load(field + _LO),
        tl.load(field + _HI),
        tl.load(field + _TARGET),
        tl.load(field + _ABOVE),
        tl.load(field + _DONE),
    )


@triton.jit
def _store_state(state_ptr, row, lo, hi, target, above, done):
    field = state_ptr + row * _FIELDS
    tl.store(field + _LO, lo)
    tl.store(field + _HI, hi)
    tl.store(field + _TARGET, target)
    tl.store(field + _ABOVE, above)
    tl.store(field + _DONE, done)


@triton.jit
def _row_measurement(
    pivots_ptr, totals_ptr, ends_ptr, row, num_parts, PARTS: tl.constexpr, NUM_PIVOTS: tl.constexpr
):
    """One row's pivots, and its sums and ends over its tiles (or, sharded, over all shards)."""
    pivots = tl.load(pivots_ptr + row * NUM_PIVOTS + tl.arange(0, NUM_PIVOTS))
    parts = row * num_parts + tl.arange(0, PARTS)
    inside = tl.arange(0, PARTS) < num_parts
    totals = tl.load(
        totals_ptr + (parts * NUM_PIVOTS)[:, None] + tl.arange(0, NUM_PIVOTS)[None, :],
        mask=inside[:, None],
        other=0,
    )
    smallest = tl.load(ends_ptr + parts * 2, mask=inside, other=float("inf"))
    largest = tl.load(ends_ptr + parts * 2 + 1, mask=inside, other=float("-inf"))
    return pivots, tl.sum(totals, axis=0), tl.min(smallest, axis=0), tl.max(largest, axis=0)


@triton.jit
def round_kernel(
    x_ptr,  # [B, V] float32, scaled logits of the rows that have top-k or top-p
    x_stride,
    lower_state_ptr,  # final state of the stage before, or None; read in the first round
    state_in_ptr,  # [B, STATE_FIELDS] int64, brackets of the round before
    pivots_in_ptr,  # [B, NUM_PIVOTS] float32, where that round measured
    totals_in_ptr,  # [B, num_parts, NUM_PIVOTS] int64, what it measured
    ends_in_ptr,  # [B, num_parts, 2] float32
    own_totals_ptr,  # [B, num_tiles, NUM_PIVOTS], this device's share of it
    own_ends_ptr,
    state_out_ptr,
    pivots_out_ptr,
    totals_out_ptr,
    ends_out_ptr,
    row_max_ptr,  # [B, num_stats] float32
    row_min_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    num_cols,  # columns of x
    vocab_size,  # columns of all shards together
    num_parts,
    num_stats,
    FIRST: tl.constexpr,
    MASS: tl.constexpr,
    BY_KEY: tl.constexpr,
    NUM_PIVOTS: tl.constexpr,
    TILE: tl.constexpr,
    PARTS: tl.constexpr,
    STATS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    num_tiles = tl.num_programs(1)
    maximum = row_max(row_max_ptr, row, num_stats, STATS)
    own = (row * num_tiles + tile) * NUM_PIVOTS + tl.arange(0, NUM_PIVOTS)
    own_ends = (row * num_tiles + tile) * 2
    empty = False
    if FIRST:
        _, top_k, top_p, min_p = row_filters(
            row, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, vocab_size
        )
        if lower_state_ptr is not None:
            lower_key = tl.load(lower_state_ptr + row * _FIELDS + _LO)
        else:
            lower_key = float_key(min_p_threshold(maximum, min_p))
        minimum = row_min(row_min_ptr, row, num_stats, STATS)
        lo, hi, target, above, done = _first_bracket(
            lower_key, maximum, minimum, top_k, top_p, MASS
        )
    else:
        lo, hi, target, above, done = _load_state(state_in_ptr, row)
        if done == 0:
            pivots, totals, smallest, largest = _row_measurement(
                pivots_in_ptr, totals_in_ptr, ends_in_ptr, row, num_parts, PARTS, NUM_PIVOTS
            )
            lo, hi, target, above, done = _advance(
                lo, hi, target, above, pivots, totals, smallest, largest,
                tl.load(top_p_ptr + row), MASS,
            )  # fmt: skip
            # Of this tile, nothing that weighs lies inside the new bracket: no need to read it.
            mine = tl.load(own_totals_ptr + own)
            upward = float_key(pivots) <= lo
            at_lo = tl.min(tl.where(upward, mine, 0x7FFFFFFFFFFFFFFF), axis=0)
            at_hi = tl.max(tl.where(float_key(pivots) >= hi, mine, 0), axis=0)
            empty = at_lo == at_hi
            empty = empty | (float_key(tl.load(own_ends_ptr + own_ends)) >= hi)
            empty = empty | (float_key(tl.load(own_ends_ptr + own_ends + 1)) < lo)
    if tile == 0:
        _store_state(state_out_ptr, row, lo, hi, target, above, done)
    if done != 0:
        return
    pivots = _pivots(lo, hi, FIRST, BY_KEY, NUM_PIVOTS)
    if tile == 0:
        tl.store(pivots_out_ptr + row * NUM_PIVOTS + tl.arange(0, NUM_PIVOTS), pivots)
    totals = tl.zeros((NUM_PIVOTS,), dtype=tl.int64)
    smallest = float("inf")
    largest = float("-inf")
    if not empty:
        cols = tile * TILE + tl.arange(0, TILE)
        x = tl.load(x_ptr + row * x_stride + cols, mask=cols < num_cols, other=float("-inf"))
        totals, smallest, largest = _measure(x, pivots, lo, hi, maximum, MASS)
    tl.store(totals_out_ptr + own, totals)
    tl.store(ends_out_ptr + own_ends, smallest)
    tl.store(ends_out_ptr + own_ends + 1, largest)


@triton.jit
def finish_kernel(
    x_ptr,
    x_stride,
    state_ptr,  # [B, STATE_FIELDS] of the last round; the answers on return
    pivots_ptr,  # [B, NUM_PIVOTS]
    totals_ptr,  # [B, num_parts, NUM_PIVOTS]
    ends_ptr,  # [B, num_parts, 2]; the tiles' own where SEARCH
    row_max_ptr,  # [B, num_stats]
    top_p_ptr,
    num_cols,
    num_tiles,
    num_parts,
    num_stats,
    MASS: tl.constexpr,
    SEARCH: tl.constexpr,
    NUM_PIVOTS: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    PARTS: tl.constexpr,
    STATS: tl.constexpr,
):
    """Takes in the last measurement; with SEARCH, then closes what the rounds left open.

    One program a row. Pivots evenly spaced in key end any search within
    32 / log2(NUM_PIVOTS + 1) + 1 turns.
    """
    row = tl.program_id(0).to(tl.int64)
    lo, hi, target, above, done = _load_state(state_ptr, row)
    if done != 0:
        return
    top_p = tl.load(top_p_ptr + row)
    pivots, totals, smallest, largest = _row_measurement(
        pivots_ptr, totals_ptr, ends_ptr, row, num_parts, PARTS, NUM_PIVOTS
    )
    lo, hi, target, above, done = _advance(
        lo, hi, target, above, pivots, totals, smallest, largest, top_p, MASS
    )
    if SEARCH:
        maximum = row_max(row_max_ptr, row, num_stats, STATS)
        tiles = tl.arange(0, TILES)
        ends = ends_ptr + (row * num_tiles + tiles) * 2
        tile_smallest = tl.load(ends, mask=tiles < num_tiles, other=float("inf"))
        tile_largest = tl.load(ends + 1, mask=tiles < num_tiles, other=float("-inf"))
        while done == 0:
            pivots = _pivots(lo, hi, False, True, NUM_PIVOTS)
            totals = tl.zeros((NUM_PIVOTS,), dtype=tl.int64)
            smallest = float("inf")
            largest = float("-inf")
            left = (tile_smallest <= key_float(hi - 1)) & (tile_largest >= key_float(lo))
            left = left.to(tl.int32)
            while tl.max(left, axis=0) > 0:
                tile = tl.argmax(left, axis=0)
                left = tl.where(tiles == tile, 0, left)
                cols = tile * TILE + tl.arange(0, TILE)
                x = tl.load(
                    x_ptr + row * x_stride + cols, mask=cols < num_cols, other=float("-inf")
                )
                more, low, high = _measure(x, pivots, lo, hi, maximum, MASS)
                totals += more
                smallest = tl.minimum(smallest, low)
                largest = tl.maximum(largest, high)
            lo, hi, target, above, done = _advance(
                lo, hi, target, above, pivots, totals, smallest, largest, top_p, MASS
            )
    _store_state(state_ptr, row, lo, hi, target, above, done)
