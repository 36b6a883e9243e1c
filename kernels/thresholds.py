"""Launches of the search for top-k and top-p thresholds (threshold_kernels.py)."""

import torch
from vllm.triton_utils import triton

from proxy_vllm.kernels.row_parameters import RowParameters
from proxy_vllm.kernels.threshold_kernels import STATE_FIELDS, finish_kernel, round_kernel

# In the order in which the filters apply; each stage starts from the threshold of the one before.
STAGES = ("top_k", "top_p")

Measurement = tuple[torch.Tensor, torch.Tensor]  # totals [B, parts, P] int64, ends [B, parts, 2]


class ThresholdSearch:
    """Buffers and launches of one stage of the search.

    Parameters
    ----------
    x: [B, V] float32, scaled logits of the rows that have a filter; one shard's columns of them.
    stage: the filter whose threshold is searched for.
    lower_state: [B, STATE_FIELDS] int64, result of the stage before; rows without this stage's
        filter take over its threshold. None in the first stage: min-p's threshold.
    row_max, row_min: [B, parts] float32, largest and smallest finite logit of the row by parts.
    rows: with all three filters.
    vocab_size: columns of all shards.
    by_key: pivots evenly spaced in float bits, which bounds the number of rounds, instead of in
        value, which closes brackets faster on real logits.
    """

    def __init__(
        self,
        x: torch.Tensor,
        stage: str,
        lower_state: torch.Tensor | None,
        row_max: torch.Tensor,
        row_min: torch.Tensor,
        rows: RowParameters,
        *,
        vocab_size: int,
        tile: int,
        num_pivots: int,
        by_key: bool = False,
        num_warps: int = 4,
    ):
        if stage not in STAGES:
            raise ValueError(f"stage: expected one of {STAGES}, got {stage!r}")
        self.x, self.lower_state, self.rows = x, lower_state, rows
        self.row_max, self.row_min = row_max, row_min
        self.vocab_size, self.by_key = vocab_size, by_key
        self.num_rows, self.num_cols = x.shape
        self.num_tiles = triton.cdiv(self.num_cols, tile)
        self.common = {
            "x_ptr": x,
            "x_stride": x.stride(0),
            "row_max_ptr": row_max,
            "num_cols": self.num_cols,
            "num_stats": row_max.shape[1],
            "MASS": stage == "top_p",
            "NUM_PIVOTS": num_pivots,
            "TILE": tile,
            "STATS": triton.next_power_of_2(row_max.shape[1]),
            "num_warps": num_warps,
        }

        def two(*shape: int, dtype: torch.dtype) -> list[torch.Tensor]:
            # Two tensors, not halves of one: Triton compiles anew for an address that is not a
            # multiple of 16 bytes, and whether the second half's is would depend on the batch.
            return [x.new_empty((self.num_rows, *shape), dtype=dtype) for _ in range(2)]

        # Each round reads what the round before wrote into the other of the two.
        self.state = two(STATE_FIELDS, dtype=torch.int64)
        self.pivots = two(num_pivots, dtype=torch.float32)
        self.totals = two(self.num_tiles, num_pivots, dtype=torch.int64)
        self.ends = two(self.num_tiles, 2, dtype=torch.float32)
        self.rounds = 0

    def round(self, measured: Measurement | None = None) -> Measurement:
        """One round, given what the round before measured over the whole row; measures anew.

        What it returns covers this object's columns, by tile. The first round is given nothing.
        """
        new, old = self.rounds % 2, (self.rounds + 1) % 2
        totals, ends = measured or (self.totals[old], self.ends[old])
        num_parts = totals.shape[1]
        round_kernel[(self.num_rows, self.num_tiles)](
            lower_state_ptr=self.lower_state if self.rounds == 0 else None,
            state_in_ptr=self.state[old],
            pivots_in_ptr=self.pivots[old],
            totals_in_ptr=totals,
            ends_in_ptr=ends,
            own_totals_ptr=self.totals[old],
            own_ends_ptr=self.ends[old],
            state_out_ptr=self.state[new],
            pivots_out_ptr=self.pivots[new],
            totals_out_ptr=self.totals[new],
            ends_out_ptr=self.ends[new],
            row_min_ptr=self.row_min,
            **self.rows.pointers("temperature", "top_k", "top_p", "min_p"),
            vocab_size=self.vocab_size,
            num_parts=num_parts,
            FIRST=self.rounds == 0,
            BY_KEY=self.by_key,
            PARTS=triton.next_power_of_2(num_parts),
            **self.common,
        )
        self.rounds += 1
        return self.totals[new], self.ends[new]

    def finish(self, measured: Measurement, search: bool) -> torch.Tensor:
        """State [B, STATE_FIELDS]: field 0 is the key of the threshold.

        With `search`, rows whose bracket is still open are searched on over this object's columns,
        which must then be the whole row and `measured` its own last round.
        """
        last = (self.rounds + 1) % 2
        totals, ends = measured
        num_parts = totals.shape[1]
        finish_kernel[(self.num_rows,)](
            state_ptr=self.state[last],
            pivots_ptr=self.pivots[last],
            totals_ptr=totals,
            ends_ptr=ends,
            **self.rows.pointers("top_p"),
            num_tiles=self.num_tiles,
            num_parts=num_parts,
            SEARCH=search,
            TILES=triton.next_power_of_2(self.num_tiles),
            PARTS=triton.next_power_of_2(num_parts),
            **self.common,
        )
        return self.state[last]


def find_thresholds(
    x: torch.Tensor,  # [B, V] float32
    stage: str,
    lower_state: torch.Tensor | None,
    tile_max: torch.Tensor,  # [B, num_tiles]
    tile_min: torch.Tensor,
    rows: RowParameters,
    *,
    tile: int,
    num_pivots: int,
    num_rounds: int,
    num_warps: int = 4,
) -> torch.Tensor:
    """One stage over unsharded rows; arguments and result as in ThresholdSearch."""
    search = ThresholdSearch(
        x,
        stage,
        lower_state,
        tile_max,
        tile_min,
        rows,
        vocab_size=x.shape[1],
        tile=tile,
        num_pivots=num_pivots,
        num_warps=num_warps,
    )
    measured = None
    for _ in range(num_rounds):
        measured = search.round(measured)
    assert measured is not None
    return search.finish(measured, search=True)
