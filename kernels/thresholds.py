"""Launches of the threshold search of select.py."""

import torch
from vllm.triton_utils import triton

from proxy_vllm.kernels.select import STATE_FIELDS, finish_kernel, round_kernel

STAGES = ("count", "mass")  # top-k and top-p

Measurement = tuple[torch.Tensor, torch.Tensor]  # totals [B, parts, P] int64, ends [B, parts, 2]


class ThresholdSearch:
    """Buffers and launches of one stage of the search.

    Parameters
    ----------
    x: [B, V] float32, scaled logits of the rows that have a filter; one shard's columns of them.
    stage: "count" searches the top-k threshold, "mass" that of top-p.
    lower_state: [B, STATE_FIELDS] int64, result of the stage before; rows without this stage's
        filter take over its threshold.
    row_max, row_min: [B, parts] float32, largest and smallest finite logit of the row by parts.
    parameters: row_to_request, temperature, top_k, top_p, min_p.
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
        parameters: tuple[torch.Tensor | None, ...],
        vocab_size: int,
        tile: int,
        num_pivots: int,
        by_key: bool = False,
        num_warps: int = 4,
    ):
        if stage not in STAGES:
            raise ValueError(f"stage: expected one of {STAGES}, got {stage!r}")
        self.x, self.lower_state, self.parameters = x, lower_state, parameters
        self.row_max, self.row_min = row_max, row_min
        self.vocab_size = vocab_size
        self.num_rows, self.num_cols = x.shape
        self.num_tiles = triton.cdiv(self.num_cols, tile)
        self.num_stats = row_max.shape[1]
        self.constants = {
            "MASS": stage == "mass",
            "BY_KEY": by_key,
            "NUM_PIVOTS": num_pivots,
            "TILE": tile,
            "STATS": triton.next_power_of_2(self.num_stats),
            "num_warps": num_warps,
        }
        rows, tiles = self.num_rows, self.num_tiles
        self.state = x.new_empty((2, rows, STATE_FIELDS), dtype=torch.int64)
        self.totals = x.new_empty((2, rows, tiles, num_pivots), dtype=torch.int64)
        self.ends = x.new_empty((2, rows, tiles, 2))
        self.rounds = 0

    def round(self, measured: Measurement | None = None) -> Measurement:
        """One round, given what the round before measured over the whole row; measures anew.

        What it returns covers this object's columns, by tile. The first round is given nothing.
        """
        new, old = self.rounds % 2, (self.rounds + 1) % 2
        mine = (self.totals[old], self.ends[old])
        totals, ends = mine if measured is None else measured
        num_parts = totals.shape[1]
        round_kernel[(self.num_rows, self.num_tiles)](
            self.x,
            self.x.stride(0),
            self.state[old],
            totals,
            ends,
            *mine,
            self.state[new],
            self.totals[new],
            self.ends[new],
            self.lower_state,
            self.row_max,
            self.row_min,
            *self.parameters,
            self.num_cols,
            self.vocab_size,
            num_parts,
            self.num_stats,
            ROUND=min(self.rounds, 2),
            PARTS=triton.next_power_of_2(num_parts),
            **self.constants,
        )
        self.rounds += 1
        return self.totals[new], self.ends[new]

    def finish(self, measured: Measurement, search: bool) -> torch.Tensor:
        """State [B, STATE_FIELDS]: field 0 is the key of the threshold.

        With `search`, rows whose bracket is still open are searched on over this object's columns,
        which must then be the whole row and `measured` its own last round.
        """
        state = self.state[(self.rounds + 1) % 2]
        totals, ends = measured
        num_parts = totals.shape[1]
        finish_kernel[(self.num_rows,)](
            self.x,
            self.x.stride(0),
            state,
            totals,
            ends,
            self.lower_state,
            self.row_max,
            *self.parameters,
            self.num_cols,
            self.num_tiles,
            num_parts,
            self.num_stats,
            LAST_ROUND=min(self.rounds - 1, 1),
            SEARCH=search,
            TILES=triton.next_power_of_2(self.num_tiles),
            PARTS=triton.next_power_of_2(num_parts),
            **self.constants,
        )
        return state


def find_thresholds(
    x: torch.Tensor,  # [B, V] float32
    stage: str,
    lower_state: torch.Tensor | None,
    tile_max: torch.Tensor,  # [B, num_tiles]
    tile_min: torch.Tensor,
    parameters: tuple[torch.Tensor | None, ...],
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
        parameters,
        x.shape[1],
        tile,
        num_pivots,
        num_warps=num_warps,
    )
    measured = None
    for _ in range(num_rounds):
        measured = search.round(measured)
    assert measured is not None
    return search.finish(measured, search=True)
