"""Explanations as columns beside vLLM's log-probabilities: from the sampler to the front end.

vLLM's runner, scheduler and sockets carry log-probabilities ``[rows, width]`` of any width. A step
in which some row asks for an explanation has more columns: at the end of a row stand W token ids
and the number W, and 4 W values (``scores.py``). Rows that do not ask have 0 there, and the
scheduler's slices of theirs are cut back to vLLM's own columns.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
from vllm.v1.outputs import LogprobsLists, LogprobsTensors

from proxy_vllm.explain.scores import VIEWS


class ExplainedTensors(LogprobsTensors):
    """In the worker."""

    def to_cpu_nonblocking(self) -> "ExplainedTensors":
        return ExplainedTensors(*super().to_cpu_nonblocking())

    def filter(self, mask: torch.Tensor) -> "ExplainedTensors":
        return ExplainedTensors(*super().filter(mask))

    def tolists(self, cu_num_generated_tokens: list[int] | None = None) -> "ExplainedLists":
        return ExplainedLists(*super().tolists(cu_num_generated_tokens))


class ExplainedLists(LogprobsLists):
    """In the scheduler, which cuts out the rows of each request."""

    def slice_request(self, req_idx: int, num_positions: int) -> LogprobsLists:
        rows = super().slice_request(req_idx, num_positions)
        if rows.logprob_token_ids[:, -1].any():
            return rows
        return split(rows, int(self.logprob_token_ids[:, -1].max()))[0]


class Block(NamedTuple):
    """The explanations of some positions of one request."""

    ids: np.ndarray  # [n, W]
    scores: np.ndarray  # [n, 4, W] float32


def attach(
    before: LogprobsTensors | None,  # of all rows
    num_rows: int,
    index: torch.Tensor,  # [n] rows that ask
    ids: torch.Tensor,  # [n, W]
    scores: torch.Tensor,  # [n, 4 * W] float32
) -> ExplainedTensors:
    """Add the columns of the rows that ask to what vLLM's sampler gave."""
    width = ids.shape[1]
    if before is None:
        none = scores.new_zeros(num_rows, 0)
        ranks = ids.new_zeros(num_rows)
        before = LogprobsTensors(none.to(ids.dtype), none, ranks)
    wide_ids = before.logprob_token_ids.new_zeros(num_rows, width + 1)
    wide_ids[index] = nn.functional.pad(ids, (0, 1), value=width).to(wide_ids.dtype)
    wide_scores = scores.new_zeros(num_rows, scores.shape[1])
    wide_scores[index] = scores
    return ExplainedTensors(
        torch.cat([before.logprob_token_ids, wide_ids], dim=1),
        torch.cat([before.logprobs, wide_scores], dim=1),
        *before[2:],
    )


def split(rows: LogprobsLists, width: int | None = None) -> tuple[LogprobsLists, Block]:
    """Take vLLM's own columns and the explanations apart.

    Args:
        rows: of one request.
        width: W, if the request's own rows do not tell.
    """
    ids, scores = rows.logprob_token_ids, rows.logprobs
    if width is None:
        width = int(ids[:, -1].max(initial=0))
    own = ids.shape[1] - width - 1
    values = scores.shape[1] - len(VIEWS) * width
    block = Block(ids[:, own:-1], scores[:, values:].reshape(len(ids), len(VIEWS), width))
    return rows._replace(logprob_token_ids=ids[:, :own], logprobs=scores[:, :values]), block
