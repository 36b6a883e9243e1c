"""Combine three logit tensors and sample, in one launch sequence that a CUDA graph can hold.

    logits = base + alpha * (expert - antiexpert)                       (arXiv 2401.08565)
    token  = argmax over kept tokens of logits / temperature + noise(seed, position, token)

Launches, all on a grid set by shapes alone:
1. `combine_kernel`, one program a tile: rows without top-k or top-p get their tile's winner here,
   from a single read of the logits; the others get their scaled logits written once as float32.
2. With top-k or top-p: `thresholds.find_thresholds`, then `filtered_kernel` draws the tile's winner
   among the kept; tiles that keep nothing are not read.
3. `winner_kernel`, one program a row: the best of the tiles' winners. A min-p row knows its
   threshold only here; tiles whose winner min-p drops, yet keep another token, are drawn again
   from the three inputs (rare: such a tile must hold a logit within log(min_p) of the maximum).

Combining and reducing are float32; noise, its keys and the tie rule are vLLM's (device.py).
"""

import torch
from vllm.triton_utils import triton

from proxy_vllm.kernels.checks import check_logits, check_request_state
from proxy_vllm.kernels.select import MAX_VOCAB
from proxy_vllm.kernels.thresholds import find_thresholds
from proxy_vllm.kernels.tiles import (
    combine_kernel,
    combine_only_kernel,
    filtered_kernel,
    winner_kernel,
)
from proxy_vllm.kernels.triton_functions import INTERPRETED, num_shared_columns, require_triton

__all__ = ["SampleLaunch", "batch_kinds", "choose_tile", "proxy_combine", "proxy_sample"]


def choose_tile(num_rows: int, vocab_size: int) -> int:
    """Columns a program works on; results do not depend on it."""
    if INTERPRETED:
        # The interpreter pays for every program, not for every column.
        return min(triton.next_power_of_2(vocab_size), 16384)
    # Two programs for each multiprocessor of a large GPU before tiles grow.
    for tile in (4096, 2048):
        if num_rows * triton.cdiv(vocab_size, tile) >= 264:
            return tile
    return 1024


def few_programs(num_rows: int, num_tiles: int) -> bool:
    """Whether launches cost more than arithmetic."""
    return num_rows * num_tiles < 1024


def batch_kinds(max_rows: int, num_cols: int) -> list[int]:
    """The smallest batch of each kind that has compiled kernels of its own."""
    kinds: dict[tuple[int, bool], int] = {}
    for rows in range(1, max_rows + 1):
        tile = choose_tile(rows, num_cols)
        kinds.setdefault((tile, few_programs(rows, triton.cdiv(num_cols, tile))), rows)
    return list(kinds.values())


def warps_for(tile: int) -> int:
    """Keeps a tile's registers at about 120 a thread on Hopper, without spills."""
    return 8 if tile >= 4096 else 4


class SampleLaunch:
    """Buffers and launches of one proxy_sample call, or of one rank's shard of it.

    Columns of the three inputs start at token `vocab_start`; `vocab_size` counts all shards.
    """

    def __init__(
        self,
        base: torch.Tensor,
        expert: torch.Tensor,
        antiexpert: torch.Tensor,
        alpha: torch.Tensor,
        temperature: torch.Tensor,
        seeds: torch.Tensor,
        positions: torch.Tensor,
        top_k: torch.Tensor | None = None,
        top_p: torch.Tensor | None = None,
        min_p: torch.Tensor | None = None,
        row_to_request: torch.Tensor | None = None,
        use_fp64_gumbel: bool = False,
        vocab_start: int = 0,
        vocab_size: int | None = None,
        tile: int | None = None,
    ):
        self.num_rows, self.num_cols = base.shape
        self.vocab_start = vocab_start
        self.vocab_size = self.num_cols if vocab_size is None else vocab_size
        self.tile = tile or choose_tile(self.num_rows, self.num_cols)
        self.num_tiles = triton.cdiv(self.num_cols, self.tile)
        self.use_fp64 = use_fp64_gumbel
        self.inputs = (
            base,
            base.stride(0),
            expert,
            expert.stride(0),
            antiexpert,
            antiexpert.stride(0),
        )
        self.num_shared = num_shared_columns(base, expert, antiexpert)
        self.alpha = alpha
        self.noise_key = (seeds, positions)
        self.filters = (row_to_request, temperature, top_k, top_p, min_p)
        self.filtered = top_k is not None or top_p is not None

        def empty(*shape, dtype=torch.float32):
            return base.new_empty(shape, dtype=dtype)

        score_dtype = torch.float64 if use_fp64_gumbel else torch.float32
        tiles = (self.num_rows, self.num_tiles)
        self.best_score = empty(*tiles, dtype=score_dtype)
        self.best_token = empty(*tiles, dtype=torch.int32)
        self.best_x = None if min_p is None else empty(*tiles)
        self.tile_max = empty(*tiles) if self.filtered or min_p is not None else None
        self.tile_min = empty(*tiles) if self.filtered else None
        self.x = empty(self.num_rows, self.num_cols) if self.filtered else None

    def combine(self) -> None:
        """Winners of the tiles of unfiltered rows; scaled logits and extremes of the others."""
        combine_kernel[(self.num_rows, self.num_tiles)](
            *self.inputs,
            self.x,
            0 if self.x is None else self.x.stride(0),
            self.best_score,
            self.best_token,
            self.best_x,
            self.tile_max,
            self.tile_min,
            self.alpha,
            *self.noise_key,
            *self.filters,
            self.num_cols,
            self.num_shared,
            self.vocab_start,
            self.vocab_size,
            TILE=self.tile,
            USE_FP64=self.use_fp64,
            num_warps=warps_for(self.tile),
        )

    def thresholds(self) -> torch.Tensor:
        """Row states [B, STATE_FIELDS] whose field 0 is the key of the smallest kept logit."""
        _, _, top_k, top_p, _ = self.filters
        small = few_programs(self.num_rows, self.num_tiles)
        state = None
        for stage, parameter in (("count", top_k), ("mass", top_p)):
            if parameter is not None:
                state = find_thresholds(
                    self.x,
                    stage,
                    state,
                    self.tile_max,
                    self.tile_min,
                    self.filters,
                    tile=self.tile,
                    # More pivots cost arithmetic and save launches.
                    num_pivots=16 if small else 8,
                    num_rounds=4 if small else 5,
                    num_warps=warps_for(self.tile),
                )
        assert state is not None
        return state

    def draw_filtered(self, state: torch.Tensor) -> None:
        """Winners of the tiles of rows with top-k or top-p, among the logits they keep."""
        filtered_kernel[(self.num_rows, self.num_tiles)](
            self.x,
            self.x.stride(0),
            state,
            self.best_score,
            self.best_token,
            self.tile_max,
            *self.noise_key,
            *self.filters[:4],
            self.num_cols,
            self.vocab_start,
            self.vocab_size,
            TILE=self.tile,
            USE_FP64=self.use_fp64,
            num_warps=warps_for(self.tile),
        )

    def winners(
        self, row_max: torch.Tensor | None = None, with_scores: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(tokens [B] int64, their scores [B] or None)."""
        tokens = self.best_token.new_empty(self.num_rows, dtype=torch.int64)
        scores = self.best_score.new_empty(self.num_rows) if with_scores else None
        winner_kernel[(self.num_rows,)](
            *self.inputs,
            self.best_score,
            self.best_token,
            self.best_x,
            self.tile_max,
            row_max,
            tokens,
            scores,
            self.alpha,
            *self.noise_key,
            *self.filters,
            self.num_cols,
            self.num_shared,
            self.vocab_start,
            self.vocab_size,
            self.num_tiles,
            TILE=self.tile,
            TILES=triton.next_power_of_2(self.num_tiles),
            USE_FP64=self.use_fp64,
            num_warps=warps_for(self.tile),
        )
        return tokens, scores


def proxy_sample(
    base: torch.Tensor,  # [B, V]
    expert: torch.Tensor,  # [B, V_e]
    antiexpert: torch.Tensor,  # [B, V_a]
    alpha: torch.Tensor,  # [slots] float32
    temperature: torch.Tensor,  # [slots] float32
    seeds: torch.Tensor,  # [slots] int64
    positions: torch.Tensor,  # [B] int64
    *,
    top_k: torch.Tensor | None = None,  # [slots] int32
    top_p: torch.Tensor | None = None,  # [slots] float32
    min_p: torch.Tensor | None = None,  # [slots] float32
    row_to_request: torch.Tensor | None = None,  # [B] int32
    use_fp64_gumbel: bool = False,
    tile: int | None = None,
) -> torch.Tensor:  # [B] int64
    """Samples one token a row from base + alpha * (expert - antiexpert).

    Logits are float32, bfloat16 or float16, of any row stride and of each member's own width;
    what a width, an infinity or a NaN means is written at `reference.combine`. A row's parameters
    are those of slot `row_to_request[row]` (of slot `row` without a map); a negative slot, the
    padding of a captured batch, gives the base's argmax.

    temperature 0 is argmax, lowest index on ties. top_k: 0, -1 or >= V is off. top_p: 1 is off.
    min_p: 0 is off. The filters apply in vLLM's order and keep the set of `reference.kept_row`.
    A NaN logit is never drawn while the row has a finite one; a row without any gives token 0.

    The noise is vLLM's `gumbel_sample` noise (float64 with `use_fp64_gumbel`, as its option): with
    alpha 0 and no top-k or top-p, tokens equal its own. They depend on the row's logits and
    parameters, the seed and the position alone: not on other rows, on `tile` (columns a program
    works on; a power of two), or on shards.

    No host synchronisation and no shape that depends on data. Raises ValueError naming the argument
    with a wrong shape, dtype, device or stride; B = 0 returns an empty tensor.

    >>> logits = torch.randn(2, 32000, device="cuda")
    >>> ones = torch.ones(2, device="cuda")
    >>> seeds = torch.tensor([1, 2], device="cuda")
    >>> proxy_sample(logits, logits, logits, ones, ones, seeds, seeds).shape
    torch.Size([2])
    """
    check_logits(base, expert, antiexpert)
    num_rows, vocab_size = base.shape
    check_request_state(
        num_rows,
        base.device,
        row_to_request,
        alpha,
        temperature,
        seeds,
        positions,
        top_k,
        top_p,
        min_p,
        sampling=True,
    )
    if vocab_size > MAX_VOCAB:
        raise ValueError(f"base: {vocab_size} columns exceed the supported {MAX_VOCAB}")
    if num_rows == 0:
        return base.new_empty(0, dtype=torch.int64)
    require_triton(base)
    launch = SampleLaunch(
        base,
        expert,
        antiexpert,
        alpha,
        temperature,
        seeds,
        positions,
        top_k,
        top_p,
        min_p,
        row_to_request,
        use_fp64_gumbel,
        tile=tile,
    )
    launch.combine()
    if launch.filtered:
        launch.draw_filtered(launch.thresholds())
    return launch.winners()[0]


def proxy_combine(
    base: torch.Tensor,  # [B, V]
    expert: torch.Tensor,  # [B, V_e]
    antiexpert: torch.Tensor,  # [B, V_a]
    alpha: torch.Tensor,  # [slots] float32
    *,
    row_to_request: torch.Tensor | None = None,  # [B] int32
    out: torch.Tensor | None = None,  # [B, V] float32
) -> torch.Tensor:  # [B, V] float32
    """base + alpha * (expert - antiexpert) in float32, as proxy_sample computes it.

    For what needs the whole distribution: logprobs, penalties, grammar masks. Arguments and errors
    as proxy_sample; NaN stays NaN, so that vLLM's count of NaN logits still sees it. `out` may have
    any row stride, and may be `base` itself where that is float32.
    """
    check_logits(base, expert, antiexpert)
    num_rows, vocab_size = base.shape
    check_request_state(num_rows, base.device, row_to_request, alpha)
    if out is None:
        out = base.new_empty(base.shape, dtype=torch.float32)
    elif out.shape != base.shape or out.dtype != torch.float32 or out.device != base.device:
        raise ValueError(
            f"out: expected float32 {list(base.shape)} on {base.device}, "
            f"got {out.dtype} {list(out.shape)} on {out.device}"
        )
    elif vocab_size > 1 and out.stride(1) != 1:
        raise ValueError(f"out: the vocabulary must have stride 1, got {out.stride(1)}")
    if num_rows == 0:
        return out
    require_triton(base)
    tile = choose_tile(num_rows, vocab_size)
    combine_only_kernel[(num_rows, triton.cdiv(vocab_size, tile))](
        base,
        base.stride(0),
        expert,
        expert.stride(0),
        antiexpert,
        antiexpert.stride(0),
        out,
        out.stride(0),
        alpha,
        row_to_request,
        vocab_size,
        num_shared_columns(base, expert, antiexpert),
        TILE=tile,
        num_warps=warps_for(tile),
    )
    return out
