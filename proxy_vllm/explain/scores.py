"""Log-probabilities of base, expert, antiexpert and their combination at a few tokens a row."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn as nn

from proxy_vllm.composite.heads import MemberLogits
from proxy_vllm.kernels.row_parameters import Steering

if TYPE_CHECKING:
    from proxy_vllm.composite.model import ProxyTunedForCausalLM

Gather = Callable[[torch.Tensor], torch.Tensor]  # stacks what all ranks pass to it

# Distributions of a row, in the order in which their values stand.
VIEWS = ("steered", "base", "expert", "antiexpert")
# Rows of logits that are float32 at once.
_ROWS = 64


def member_scores(
    model: "ProxyTunedForCausalLM",
    logits: MemberLogits,
    steering: Steering,  # of N rows
    tokens: torch.Tensor,  # [N] int64, drawn
    top: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Score the drawn token, and the first ``top`` of the steered model and of the base.

    Each model's log-probabilities are over the columns that the formula reads of it: all of the
    base's, and of the small members' those that the base has too and the expert does not forbid.

    Returns:
        ``[N, W]`` int64 token ids with ``W = 1 + 2 * top`` (fewer where the vocabulary is smaller)
        and ``[N, 4 * W]`` float32 log-probabilities, those of each of ``VIEWS`` after the other;
        -inf where a model gives no probability or lacks the token. Some tokens stand twice.
    """
    columns, total = logits.columns, logits.columns.total
    if logits.sharded:
        assert model.sharded_heads is not None
        gather: Gather = model.sharded_heads.exchange.gather
        steered = model.sharded_heads.combined_local(logits, steering)
        steered = steered[:, : logits.members[0].shape[1]]
    else:
        gather = lambda tensor: tensor[None]  # noqa: E731
        steered = model.combine(logits, steering)
    views = [_some_columns(view[:, : total - columns.start]) for view in (steered, *logits.members)]
    firsts = [_first(view, min(top, total), columns.start, gather) for view in views[:2]]
    ids = torch.cat([tokens[:, None], *firsts], dim=1)
    return ids, _log_probabilities(views, ids - columns.start, gather)


def _some_columns(shard: torch.Tensor) -> torch.Tensor:
    """The shard; for an empty one a column without probability."""
    return shard if shard.shape[1] else shard.new_full((shard.shape[0], 1), -torch.inf)


def _first(
    logits: torch.Tensor,  # [N, n]
    top: int,
    start: int,
    gather: Gather,
) -> torch.Tensor:  # [N, top] int64
    """The likeliest tokens of all ranks' columns."""
    here = min(top, logits.shape[1])
    values, ids = logits.topk(here, dim=1)
    missing = (0, top - here)
    values = nn.functional.pad(values.double(), missing, value=-torch.inf)
    ids = nn.functional.pad(ids + start, missing)
    both = gather(torch.stack([values, ids.double()]))  # [ranks, 2, N, top]
    if both.shape[0] == 1:
        return ids
    values, ids = both.permute(1, 2, 0, 3).flatten(2).unbind(0)
    order = values.sort(dim=1, descending=True, stable=True).indices[:, :top]
    return ids.gather(1, order).long()


def _log_probabilities(
    views: list[torch.Tensor],  # 4 x [N, up to n]
    at: torch.Tensor,  # [N, W] int64, columns
    gather: Gather,
) -> torch.Tensor:  # [N, 4 * W] float32
    parts = []
    for view in views:
        width = view.shape[1]
        outside = (at < 0) | (at >= width)
        inside = at.clamp(0, width - 1)
        for rows, index, absent in zip(
            view.split(_ROWS), inside.split(_ROWS), outside.split(_ROWS), strict=True
        ):
            rows = rows.float()
            found = rows.gather(1, index).masked_fill(absent, -torch.inf)
            parts.append(torch.cat([found, rows.logsumexp(1, keepdim=True)], dim=1))
    chunks = len(parts) // len(views)
    joined = [torch.cat(parts[i * chunks : (i + 1) * chunks]) for i in range(len(views))]
    packed = gather(torch.stack(joined, dim=1))  # [ranks, N, 4, W + 1]
    found, sums = packed[..., :-1].amax(dim=0), packed[..., -1:].logsumexp(dim=0)
    return (found - sums).flatten(1)
