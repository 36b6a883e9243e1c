"""Combine three logit tensors and sample, in one launch sequence that a CUDA graph can hold.

    logits = base + alpha * (expert - antiexpert)                       (arXiv 2401.08565)
    token  = argmax over kept tokens of logits / temperature + noise(seed, position, token)

Launches, all on a grid set by shapes alone:
1. `combine_kernel`, one program a tile: rows without top-k or top-p get their tile's winner here,
   from a single read of the logits; the others get their scaled logits written once as float32.
2. Where rows may have top-k or top-p: `thresholds.find_thresholds`, then `filtered_kernel` draws
   the tile's winner among the kept; tiles that keep nothing are not read.
3. `winner_kernel`, one program a row: the best of the tiles' winners. A min-p row knows its
   threshold only here; `filtered_winner_kernel` draws tiles whose winner min-p drops, yet keep
   another token, again from the three inputs (rare: such a tile must hold a logit within
   log(min_p) of the maximum).

Combining and reducing are float32; noise, its keys and the tie rule are vLLM's
(triton_functions.py).
"""

import torch
from vllm.triton_utils import triton

from proxy_vllm.kernels.base_max import base_max_kernel
from proxy_vllm.kernels.checks import check_logits
from proxy_vllm.kernels.columns import Columns, shift_of_missing
from proxy_vllm.kernels.combine_sample_kernels import (
    combine_kernel,
    combine_only_kernel,
    filtered_kernel,
    filtered_winner_kernel,
    winner_kernel,
)
from proxy_vllm.kernels.row_parameters import RowParameters, check_alpha
from proxy_vllm.kernels.threshold_kernels import MAX_VOCAB
from proxy_vllm.kernels.thresholds import STAGES, find_thresholds
from proxy_vllm.kernels.triton_functions import INTERPRETED, require_triton

__all__ = ["SampleLaunch", "batch_kinds", "choose_tile", "proxy_combine", "proxy_sample"]

_SMALL_TILE, _LARGE_TILE = 1024, 4096


def choose_tile(num_rows: int, vocab_size: int) -> int:
    """Columns a program works on; results do not depend on it. One of two: each is compiled."""
    if INTERPRETED:
        # The interpreter pays for every program, not for every column.
        return min(triton.next_power_of_2(vocab_size), 16384)
    # Large tiles once they alone give each multiprocessor of a large GPU two programs.
    enough = num_rows * triton.cdiv(vocab_size, _LARGE_TILE) >= 264
    return _LARGE_TILE if enough else _SMALL_TILE


def batch_kinds(max_rows: int, num_cols: int) -> list[int]:
    """The smallest batch of each kind that has compiled kernels of its own."""
    kinds: dict[int, int] = {}
    for rows in range(1, max_rows + 1):
        kinds.setdefault(choose_tile(rows, num_cols), rows)
    return list(kinds.values())


def warps_for(tile: int) -> int:
    """Keeps a tile's registers at about 120 a thread on Hopper, without spills."""
    return 8 if tile >= _LARGE_TILE else 4


def formula_arguments(
    base: torch.Tensor,
    expert: torch.Tensor,
    antiexpert: torch.Tensor,
    columns: Columns,
    missing_shift: torch.Tensor | None,  # [B] float32
    log_beta: torch.Tensor | None,  # [B] float32
    base_max: torch.Tensor | None,  # [B, parts] float32
) -> dict[str, torch.Tensor | int | None]:
    """What kernels that combine logits need, by keyword."""
    parts = 1 if base_max is None else base_max.shape[1]
    members = {"base": base, "expert": expert, "antiexpert": antiexpert}
    pointers = {f"{name}_ptr": logits for name, logits in members.items()}
    strides = {f"{name}_stride": logits.stride(0) for name, logits in members.items()}
    return {
        **pointers,
        **strides,
        "missing_ptr": missing_shift,
        "num_cols": base.shape[1],
        "num_shared": columns.local(columns.shared, base.shape[1]),
        "num_named": columns.local(columns.named, base.shape[1]),
        "log_beta_ptr": log_beta,
        "base_max_ptr": base_max,
        "num_base_max": parts,
        "BASE_MAX": triton.next_power_of_2(parts),
    }


def find_base_max(
    base: torch.Tensor,
    expert: torch.Tensor,
    antiexpert: torch.Tensor,
    alpha: torch.Tensor,  # [B] float32
    log_beta: torch.Tensor,  # [B] float32
    columns: Columns,
    tile: int | None = None,
) -> torch.Tensor:  # [B, num_tiles] float32
    """The base's largest logit among tokens that can be drawn, by tiles, of rows with a log_beta.

    Bytes: the base's logits once more, a third of what combining reads. For V = 128k and bfloat16
    on an H200 at 4.3 TB/s that is at least 3.8 us at B = 64, if nothing of it is left in the cache,
    and one launch. Whether a token stays must be known before filters count tokens, so that the
    maximum cannot be found on the way.
    """
    num_rows, num_cols = base.shape
    tile = tile or choose_tile(num_rows, num_cols)
    grid = (num_rows, triton.cdiv(num_cols, tile))
    out = base.new_empty(grid, dtype=torch.float32)
    arguments = formula_arguments(base, expert, antiexpert, columns, None, log_beta, out)
    for name in ("missing_ptr", "num_base_max", "BASE_MAX"):
        del arguments[name]
    base_max_kernel[grid](**arguments, alpha_ptr=alpha, TILE=tile, num_warps=warps_for(tile))
    return out


class SampleLaunch:
    """Buffers and launches of one proxy_sample call, or of one rank's shard of it.

    `missing_shift` [B] is required where a small member lacks some of the `columns`, and `base_max`
    where some row has a `log_beta`: of shards over all of them.
    """

    def __init__(
        self,
        base: torch.Tensor,
        expert: torch.Tensor,
        antiexpert: torch.Tensor,
        rows: RowParameters,
        *,
        columns: Columns,
        missing_shift: torch.Tensor | None = None,
        base_max: torch.Tensor | None = None,  # [B, parts] float32
        use_fp64_gumbel: bool = False,
        tile: int | None = None,
    ):
        self.rows = rows = rows.complete()
        num_rows, num_cols = base.shape
        self.tile = tile or choose_tile(num_rows, num_cols)
        self.num_tiles = triton.cdiv(num_cols, self.tile)
        self.grid = (num_rows, self.num_tiles)
        self.columns = columns
        # The filters whose thresholds are searched for, in order.
        self.stages = [stage for stage in STAGES if rows.filtered and stage in rows.used]

        def by_tile(dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return base.new_empty(self.grid, dtype=dtype)

        score_dtype = torch.float64 if use_fp64_gumbel else torch.float32
        self.winners_by_tile = {
            "best_score_ptr": by_tile(score_dtype),
            "best_token_ptr": by_tile(torch.int32),
        }
        self.x = self.best_x = self.tile_max = self.tile_min = None
        if rows.filtered:
            self.best_x, self.tile_max, self.tile_min = by_tile(), by_tile(), by_tile()
            self.x = base.new_empty((num_rows, num_cols), dtype=torch.float32)
        self.formula = {
            **formula_arguments(
                base, expert, antiexpert, columns, missing_shift, rows.log_beta, base_max
            ),
            **rows.pointers("alpha"),
        }
        self.draw = {
            **rows.pointers("temperature", "seeds", "positions", "top_k", "top_p", "min_p"),
            "vocab_start": columns.start,
            "vocab_size": columns.total,
            "TILE": self.tile,
            "USE_FP64": use_fp64_gumbel,
            "num_warps": warps_for(self.tile),
        }

    def combine(self) -> None:
        """Winners of the tiles of unfiltered rows; scaled logits and extremes of the others."""
        combine_kernel[self.grid](
            **self.formula,
            **self.winners_by_tile,
            x_ptr=self.x,
            x_stride=0 if self.x is None else self.x.stride(0),
            best_x_ptr=self.best_x,
            tile_max_ptr=self.tile_max,
            tile_min_ptr=self.tile_min,
            **self.draw,
            FILTERED=self.rows.filtered,
        )

    def thresholds(self) -> torch.Tensor:
        """Row states [B, STATE_FIELDS] whose field 0 is the key of the smallest kept logit."""
        # More pivots cost arithmetic and save launches, which is what few programs pay for.
        few = self.tile < _LARGE_TILE
        state = None
        for stage in self.stages:
            state = find_thresholds(
                self.x,
                stage,
                state,
                self.tile_max,
                self.tile_min,
                self.rows,
                tile=self.tile,
                num_pivots=16 if few else 8,
                num_rounds=4 if few else 5,
                num_warps=warps_for(self.tile),
            )
        assert state is not None
        return state

    def draw_filtered(self, state: torch.Tensor) -> None:
        """Winners of the tiles of rows with top-k or top-p, among the logits they keep."""
        assert self.x is not None
        filtered_kernel[self.grid](
            x_ptr=self.x,
            x_stride=self.x.stride(0),
            state_ptr=state,
            **self.winners_by_tile,
            tile_max_ptr=self.tile_max,
            num_cols=self.x.shape[1],
            **self.draw,
        )

    def winners(self, row_max: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """(tokens [B] int64, their scores [B]); row_max [B, 1] where tiles lie on other ranks."""
        if not self.rows.filtered:
            return winner_of_tiles(**self.winners_by_tile, vocab_start=self.columns.start)
        tokens, scores = _results(self.winners_by_tile["best_score_ptr"])
        row_max = self.tile_max if row_max is None else row_max
        assert row_max is not None
        filtered_winner_kernel[(self.grid[0],)](
            **self.formula,
            **self.winners_by_tile,
            best_x_ptr=self.best_x,
            tile_max_ptr=self.tile_max,
            row_max_ptr=row_max,
            token_ptr=tokens,
            score_ptr=scores,
            **self.draw,
            num_tiles=self.num_tiles,
            num_stats=row_max.shape[1],
            TILES=triton.next_power_of_2(self.num_tiles),
            STATS=triton.next_power_of_2(row_max.shape[1]),
        )
        return tokens, scores


def _results(best_score: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    num_rows = best_score.shape[0]
    return best_score.new_empty(num_rows, dtype=torch.int64), best_score.new_empty(num_rows)


def winner_of_tiles(
    best_score_ptr: torch.Tensor,  # [B, num_tiles] float32 or float64
    best_token_ptr: torch.Tensor,  # [B, num_tiles] int32
    vocab_start: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens [B] int64, their scores [B]) of the tiles' winners, lowest token on ties."""
    num_rows, num_tiles = best_score_ptr.shape
    tokens, scores = _results(best_score_ptr)
    winner_kernel[(num_rows,)](
        best_score_ptr=best_score_ptr,
        best_token_ptr=best_token_ptr,
        token_ptr=tokens,
        score_ptr=scores,
        vocab_start=vocab_start,
        num_tiles=num_tiles,
        TILES=triton.next_power_of_2(num_tiles),
    )
    return tokens, scores


def proxy_sample(
    base: torch.Tensor,  # [B, V]
    expert: torch.Tensor,  # [B, V_e]
    antiexpert: torch.Tensor,  # [B, V_a]
    rows: RowParameters,
    *,
    columns: Columns | None = None,
    use_fp64_gumbel: bool = False,
    tile: int | None = None,
) -> torch.Tensor:  # [B] int64
    """Samples one token a row from base + alpha * (expert - antiexpert).

    Logits are float32, bfloat16 or float16, of any row stride and of each member's own width;
    what a width, an infinity or a NaN means is written at `reference.combine`, what a parameter
    means at `RowParameters`. Without `columns`, each column of the base is a token that has a name.

    temperature 0 is argmax, lowest index on ties. The filters apply in vLLM's order and keep the
    set of `reference.kept_row`. A NaN logit is never drawn while the row has a finite one; a row
    without any gives token 0.

    The noise is vLLM's `gumbel_sample` noise (float64 with `use_fp64_gumbel`, as its option): with
    alpha 0 and no top-k or top-p, tokens equal its own. They depend on the row's logits and
    parameters, the seed and the position alone: not on other rows, on `tile` (columns a program
    works on; a power of two), or on shards.

    No host synchronisation and no shape that depends on data. Raises ValueError naming the argument
    with a wrong shape, dtype, device or stride; B = 0 returns an empty tensor.

    >>> logits = torch.randn(2, 32000, device="cuda")
    >>> ones = torch.ones(2, device="cuda")
    >>> seeds = torch.tensor([1, 2], device="cuda")
    >>> rows = RowParameters(alpha=ones, temperature=ones, seeds=seeds, positions=seeds)
    >>> proxy_sample(logits, logits, logits, rows).shape
    torch.Size([2])
    """
    check_logits(base, expert, antiexpert)
    num_rows, vocab_size = base.shape
    rows.check(num_rows, base.device)
    if vocab_size > MAX_VOCAB:
        raise ValueError(f"base: {vocab_size} columns exceed the supported {MAX_VOCAB}")
    if num_rows == 0:
        return base.new_empty(0, dtype=torch.int64)
    require_triton(base)
    columns = columns or Columns.of(base, expert, antiexpert)
    tile = tile or choose_tile(num_rows, vocab_size)
    base_max = None
    if rows.masked:
        assert rows.log_beta is not None
        base_max = find_base_max(base, expert, antiexpert, rows.alpha, rows.log_beta, columns, tile)
    elif rows.log_beta is not None:
        # Not read: so many parts as with a log_beta, since Triton compiles for their number.
        base_max = base.new_empty(num_rows, triton.cdiv(vocab_size, tile), dtype=torch.float32)
    launch = SampleLaunch(
        base,
        expert,
        antiexpert,
        rows,
        columns=columns,
        missing_shift=shift_of_missing(expert, antiexpert, columns),
        base_max=base_max,
        use_fp64_gumbel=use_fp64_gumbel,
        tile=tile,
    )
    launch.combine()
    if launch.stages:
        launch.draw_filtered(launch.thresholds())
    return launch.winners()[0]


def proxy_combine(
    base: torch.Tensor,  # [B, V]
    expert: torch.Tensor,  # [B, V_e]
    antiexpert: torch.Tensor,  # [B, V_a]
    alpha: torch.Tensor,  # [B] float32
    *,
    columns: Columns | None = None,
    missing_shift: torch.Tensor | None = None,  # [B] float32
    log_beta: torch.Tensor | None = None,  # [B] float32
    drop: torch.Tensor | None = None,  # [B] float32
    base_max: torch.Tensor | None = None,  # [B, parts] float32
    out: torch.Tensor | None = None,  # [B, V] float32
) -> torch.Tensor:  # [B, V] float32
    """base + alpha * (expert - antiexpert) in float32, as proxy_sample computes it.

    For what needs the whole distribution: logprobs, penalties, grammar masks. Arguments and errors
    as proxy_sample; NaN stays NaN, so that vLLM's count of NaN logits still sees it. `out` may have
    any row stride, and may be `base` itself where that is float32. `missing_shift` is that of
    `shift_of_missing` and `base_max` that of `find_base_max`, computed here unless they are given
    (for shards). `log_beta` as in `RowParameters`; the logits of tokens that it finds implausible
    lose `drop`, and are -inf without it.
    """
    check_logits(base, expert, antiexpert)
    num_rows, vocab_size = base.shape
    check_alpha(alpha, num_rows, base.device)
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
    columns = columns or Columns.of(base, expert, antiexpert)
    if missing_shift is None:
        missing_shift = shift_of_missing(expert, antiexpert, columns)
    tile = choose_tile(num_rows, vocab_size)
    if log_beta is not None and base_max is None:
        base_max = find_base_max(base, expert, antiexpert, alpha, log_beta, columns, tile)
    combine_only_kernel[(num_rows, triton.cdiv(vocab_size, tile))](
        **formula_arguments(base, expert, antiexpert, columns, missing_shift, log_beta, base_max),
        drop_ptr=drop,
        out_ptr=out,
        out_stride=out.stride(0),
        alpha_ptr=alpha,
        TILE=tile,
        num_warps=warps_for(tile),
    )
    return out
