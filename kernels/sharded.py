"""Proxy sampling over a vocabulary that tensor parallelism splits.

Each rank combines its own columns of the three members; what the ranks exchange per row is a
(score, token) pair, and with filters some counts or masses, never logits. Noise is keyed by token
id and sums are integers, so tokens equal those of the unsharded kernels.

Shards follow the base's boundaries: on every rank column 0 of all three shards is token
`columns.start`, the expert's and antiexpert's shards may be shorter or longer than the base's.
`realign_columns` brings a member there whose padding put its boundaries elsewhere (Qwen2.5 pads
151936 to 152064 for some sizes); loading its head on the base's boundaries costs nothing at run
time and is better.

Collectives of one call, each an all_gather (float64 unless said):

| rows may have | calls | bytes a row and rank |
|---|---|---|
| temperature only (fused_head.py too) | 1 | 16 |
| min-p | 2 | 16 + 8 |
| top-k or top-p | 2 + 8 | 16 + 8 + 8 * 144 (int64) |
| top-k and top-p | 2 + 16 | 16 + 8 + 16 * 144 (int64) |
| tokens that a small member lacks | 1 more | 8 (float32) more |
| a plausibility threshold | 1 more | 4 (float32) more |
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from proxy_vllm.kernels.checks import check_logits
from proxy_vllm.kernels.columns import Columns, shift_of_missing
from proxy_vllm.kernels.combine_sample import (
    SampleLaunch,
    find_base_max,
    proxy_combine,
    warps_for,
)
from proxy_vllm.kernels.row_parameters import RowParameters
from proxy_vllm.kernels.threshold_kernels import MAX_VOCAB
from proxy_vllm.kernels.thresholds import Measurement, ThresholdSearch
from proxy_vllm.kernels.triton_functions import require_triton

Range = tuple[int, int]  # first token of a shard, and one past its last

# With 16 pivots 8 rounds tell any two of the 2**32 float32 keys apart: 2**32 / (16 * 17**7) < 1.
NUM_PIVOTS = 16
NUM_ROUNDS = 8


class Exchange:
    """all_gather of equally shaped small tensors over a process group; counts what it sends.

    `group` None is the default group; a world of one needs no process group at all.
    """

    def __init__(self, group: dist.ProcessGroup | None = None):
        self.group = group
        self.size = dist.get_world_size(group) if dist.is_initialized() else 1
        self.rank = dist.get_rank(group) if dist.is_initialized() else 0
        self.calls = 0
        self.bytes_sent = 0

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """[ranks, *tensor.shape], in rank order."""
        if self.size == 1:
            return tensor[None]
        out = tensor.new_empty(self.size * tensor.numel())
        dist.all_gather_into_tensor(out, tensor.flatten(), group=self.group)
        self.calls += 1
        self.bytes_sent += tensor.numel() * tensor.element_size()
        return out.view(self.size, *tensor.shape)


def merge_shards(
    scores: torch.Tensor,  # [ranks, B] float32 or float64
    tokens: torch.Tensor,  # [ranks, B] int64
) -> torch.Tensor:  # [B] int64
    """The token with the largest score of all ranks; of equals the lowest, as unsharded."""
    best = scores.max(dim=0).values
    last = torch.iinfo(torch.int64).max
    return torch.where(scores == best, tokens, last).min(dim=0).values


def merge_ranks(
    exchange: Exchange,
    scores: torch.Tensor,  # [B], of each row's best token in this rank's shard
    tokens: torch.Tensor,  # [B] int64
) -> torch.Tensor:  # [B] int64, the same on every rank
    """The best token of all shards: one collective, 16 bytes a row."""
    pairs = exchange.gather(torch.stack([scores.double(), tokens.double()], dim=1))
    return merge_shards(pairs[..., 0], pairs[..., 1].long())


def _some_columns(*shards: torch.Tensor) -> list[torch.Tensor]:
    """The members' shards; for an empty one a column that cannot win."""
    return [
        shard.new_full((shard.shape[0], 1), -torch.inf) if shard.shape[-1] == 0 else shard
        for shard in shards
    ]


@dataclass
class ShardedSampler:
    """One rank's part of a sampling step; `exchange` is shared by calls so that it can count."""

    exchange: Exchange

    def sample(
        self,
        base: torch.Tensor,  # [B, n], this rank's columns
        expert: torch.Tensor,  # [B, n_e]
        antiexpert: torch.Tensor,  # [B, n_a]
        rows: RowParameters,
        *,
        columns: Columns,
        use_fp64_gumbel: bool = False,
        tile: int | None = None,
    ) -> torch.Tensor:  # [B] int64, the same on every rank
        """proxy_sample over shards: same arguments, tokens and errors.

        Shards neither overlap nor leave a gap, and may be empty. Every rank must pass the same
        filters: they decide which collectives run.
        """
        base, expert, antiexpert = _some_columns(base, expert, antiexpert)
        check_logits(base, expert, antiexpert)
        rows.check(base.shape[0], base.device)
        if not 0 < columns.total <= MAX_VOCAB:
            raise ValueError(f"columns: {columns.total} are not within 1..{MAX_VOCAB}")
        if not 0 <= columns.start <= columns.total:
            raise ValueError(f"columns: the first, {columns.start}, is outside 0..{columns.total}")
        if base.shape[0] == 0:
            return base.new_empty(0, dtype=torch.int64)
        require_triton(base)
        launch = SampleLaunch(
            base,
            expert,
            antiexpert,
            rows,
            columns=columns,
            missing_shift=self.missing_shift(expert, antiexpert, columns),
            base_max=self.base_max(base, expert, antiexpert, rows, columns),
            use_fp64_gumbel=use_fp64_gumbel,
            tile=tile,
        )
        launch.combine()
        row_max = None
        if rows.filtered:
            row_max, row_min = self._extremes(launch)
            if launch.stages:
                launch.draw_filtered(self._thresholds(launch, row_max, row_min))
        tokens, scores = launch.winners(row_max)
        return merge_ranks(self.exchange, scores, tokens)

    def missing_shift(
        self, expert: torch.Tensor, antiexpert: torch.Tensor, columns: Columns
    ) -> torch.Tensor | None:  # [B] float32
        """`shift_of_missing` over all shards: one collective, where they lack any."""
        return shift_of_missing(expert, antiexpert, columns, self.exchange.gather)

    def base_max(
        self,
        base: torch.Tensor,  # [B, n], not empty
        expert: torch.Tensor,
        antiexpert: torch.Tensor,
        rows: RowParameters,
        columns: Columns,
    ) -> torch.Tensor | None:  # [B, 1] float32
        """`find_base_max` over all shards: one collective, where some row may have a log_beta."""
        if rows.log_beta is None:
            return None
        if not rows.masked:
            return base.new_empty(base.shape[0], 1, dtype=torch.float32)  # not read
        own = find_base_max(base, expert, antiexpert, rows.alpha, rows.log_beta, columns)
        return self.exchange.gather(own.amax(dim=1, keepdim=True)).amax(dim=0)

    def combine(
        self,
        base: torch.Tensor,  # [B, n]
        expert: torch.Tensor,
        antiexpert: torch.Tensor,
        rows: RowParameters,
        *,
        columns: Columns,
    ) -> torch.Tensor:  # [B, n] float32; of an empty shard one column of -inf
        """proxy_combine of this rank's columns."""
        base, expert, antiexpert = _some_columns(base, expert, antiexpert)
        return proxy_combine(
            base,
            expert,
            antiexpert,
            rows.alpha,
            columns=columns,
            missing_shift=self.missing_shift(expert, antiexpert, columns),
            log_beta=rows.log_beta,
            base_max=self.base_max(base, expert, antiexpert, rows, columns),
        )

    def _extremes(self, launch: SampleLaunch) -> tuple[torch.Tensor, torch.Tensor]:
        """([B, 1], [B, 1]) largest and smallest finite scaled logit of all shards.

        Meaningless for rows without a filter: their tiles store none.
        """
        assert launch.tile_max is not None and launch.tile_min is not None
        largest, smallest = launch.tile_max.amax(dim=1), launch.tile_min.amin(dim=1)
        both = self.exchange.gather(torch.stack([largest, -smallest], dim=1)).amax(dim=0)
        return both[:, :1].contiguous(), -both[:, 1:]

    def _thresholds(
        self, launch: SampleLaunch, row_max: torch.Tensor, row_min: torch.Tensor
    ) -> torch.Tensor:
        """Row states with the thresholds over all shards, as SampleLaunch.thresholds."""
        state = None
        for stage in launch.stages:
            search = ThresholdSearch(
                launch.x,
                stage,
                state,
                row_max,
                row_min,
                launch.rows,
                vocab_size=launch.columns.total,
                tile=launch.tile,
                num_pivots=NUM_PIVOTS,
                by_key=True,
                num_warps=warps_for(launch.tile),
            )
            measured = None
            for _ in range(NUM_ROUNDS):
                measured = self._sum(*search.round(measured))
            state = search.finish(measured, search=False)
        assert state is not None
        return state

    def _sum(self, totals: torch.Tensor, ends: torch.Tensor) -> Measurement:
        """A measurement by tiles, over all tiles of all ranks: one collective."""
        # min(smallest) and max(largest) as max of floats, their bits beside the int64 totals.
        outer = torch.stack([-ends[..., 0], ends[..., 1]], dim=-1).amax(dim=1)
        packed = torch.cat([totals.sum(dim=1), outer.view(torch.int32).long()], dim=1)
        gathered = self.exchange.gather(packed)
        totals = gathered[..., :NUM_PIVOTS].sum(dim=0)
        outer = gathered[..., NUM_PIVOTS:].int().view(torch.float32).amax(dim=0)
        ends = torch.stack([-outer[:, 0], outer[:, 1]], dim=1)
        return totals[:, None].contiguous(), ends[:, None].contiguous()

    def logprobs(
        self,
        base: torch.Tensor,
        expert: torch.Tensor,
        antiexpert: torch.Tensor,
        rows: RowParameters,
        tokens: torch.Tensor,  # [B] int64, sampled tokens
        num_logprobs: int,
        *,
        columns: Columns,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Raw logprobs of the combined logits, from per-shard candidates and log-sum-exps.

        Returns ([B, 1 + n] token ids, the sampled one first and then the n most likely; their
        logprobs float32; [B] rank of the sampled token, 0 for the most likely). Of equals any may
        come first, as with torch.topk. Two collectives: 8 * (2 n + 2) bytes a row, then 8.
        """
        logits = self.combine(base, expert, antiexpert, rows, columns=columns)
        num_cols = logits.shape[1]
        local = tokens - columns.start
        mine = (local >= 0) & (local < num_cols)
        own = logits.gather(1, local.clamp(0, num_cols - 1)[:, None])[:, 0]
        own = torch.where(mine, own, -torch.inf)
        wanted = min(num_logprobs, num_cols)
        values, ids = logits.topk(wanted, dim=1)
        padding = num_logprobs - wanted
        values = torch.nn.functional.pad(values, (0, padding), value=-torch.inf)
        ids = torch.nn.functional.pad(ids + columns.start, (0, padding), value=columns.total)
        packed = torch.cat(
            [logits.logsumexp(1, keepdim=True), own[:, None], values, ids], dim=1
        ).double()
        gathered = self.exchange.gather(packed)
        lse = gathered[..., 0].logsumexp(dim=0)
        own = gathered[..., 1].amax(dim=0)
        values = gathered[..., 2 : 2 + num_logprobs].transpose(0, 1).flatten(1)
        ids = gathered[..., 2 + num_logprobs :].transpose(0, 1).flatten(1).long()
        order = values.sort(dim=1, descending=True, stable=True).indices[:, :num_logprobs]
        ids = torch.cat([tokens[:, None], ids.gather(1, order)], dim=1)
        scores = torch.cat([own[:, None], values.gather(1, order)], dim=1) - lse[:, None]
        larger = (logits.double() > own[:, None]).sum(dim=1)
        ranks = self.exchange.gather(larger).sum(dim=0)
        return ids, scores.float(), ranks


def common(a: Range, b: Range) -> Range:
    """The tokens of both ranges; empty, but within `a`'s reach, where they have none in common."""
    low = max(a[0], b[0])
    return low, max(low, min(a[1], b[1]))


def changes_rank(own: list[Range], wanted: list[Range]) -> bool:
    """Whether a column that one rank wants lies on another, given every rank's ranges."""
    pairs = [(a, b) for i, a in enumerate(own) for j, b in enumerate(wanted) if i != j]
    return any(low < high for low, high in (common(*pair) for pair in pairs))


def realign_columns(
    shard: torch.Tensor,  # [B, end - start] of own[rank]
    own: list[Range],
    wanted: list[Range],
    exchange: Exchange,
) -> torch.Tensor:  # [B, columns of wanted[rank] that exist]
    """Moves a member's columns from its own shard boundaries to the base's.

    `own` and `wanted` hold every rank's (first token, end). Only columns that change rank travel,
    in one all_to_all; where none does there is no collective. Wanted columns that no rank has must
    be at the end, and are left out.
    Raises ValueError where `shard` does not have the columns that `own` says.
    """
    rank, rows = exchange.rank, shard.shape[0]
    start, end = own[rank]
    if shard.dim() != 2 or shard.shape[1] != end - start:
        raise ValueError(f"shard: expected {end - start} columns, got {list(shard.shape)}")

    outgoing = [common(own[rank], want) for want in wanted]
    incoming = [common(have, wanted[rank]) for have in own]
    kept = shard[:, outgoing[rank][0] - start : outgoing[rank][1] - start]
    if not changes_rank(own, wanted):
        return kept
    sizes_out = [0 if r == rank else rows * (b - a) for r, (a, b) in enumerate(outgoing)]
    sizes_in = [0 if r == rank else rows * (b - a) for r, (a, b) in enumerate(incoming)]
    parts = [shard[:, a - start : b - start].flatten() for a, b in outgoing]
    parts[rank] = parts[rank][:0]
    received = shard.new_empty(sum(sizes_in))
    dist.all_to_all_single(received, torch.cat(parts), sizes_in, sizes_out, group=exchange.group)
    exchange.calls += 1
    exchange.bytes_sent += sum(sizes_out) * shard.element_size()
    pieces = list(received.split(sizes_in))
    pieces = [piece.view(rows, -1) if piece.numel() else shard[:, :0] for piece in pieces]
    pieces[rank] = kept
    return torch.cat(pieces, dim=1)
