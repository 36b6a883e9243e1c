"""Explanations on the V1 runner of a CPU, after vLLM's sampler has drawn."""

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from vllm.v1.outputs import SamplerOutput
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from proxy_vllm.composite.heads import MemberLogits
from proxy_vllm.explain.columns import attach
from proxy_vllm.explain.scores import member_scores
from proxy_vllm.kernels.row_parameters import Steering

if TYPE_CHECKING:
    from proxy_vllm.composite.model import ProxyTunedForCausalLM

Kept = list[tuple[MemberLogits, Steering]]  # of rows in their order


def explain_step(
    model: "ProxyTunedForCausalLM",
    output: SamplerOutput,
    kept: Kept,
    tops: np.ndarray,  # [B], how many of the likeliest tokens each request wants; 0 for none
    drafts: SpecDecodeMetadata | None,
) -> SamplerOutput:
    """Add what steering did to the tokens of the requests that ask."""
    requests = np.flatnonzero(tops)
    tokens = output.sampled_token_ids.long()  # [B, width], -1 behind a request's last
    width = tokens.shape[1]
    first = np.arange(len(tops)) if drafts is None else _first_rows(drafts)
    last = np.append(first[1:], sum(len(steering.alpha) for _, steering in kept)) - 1
    step = np.arange(width)
    rows = torch.from_numpy(np.minimum(first[requests, None] + step, last[requests, None]).ravel())
    places = torch.from_numpy((requests[:, None] * width + step).ravel())
    steering = Steering.joined([steering for _, steering in kept])
    ids, scores = member_scores(
        model,
        _joined([logits for logits, _ in kept], rows),
        steering.select(rows),
        tokens.flatten()[places].clamp(min=0),
        int(tops.max()),
    )
    return replace(
        output,
        logprobs_tensors=attach(output.logprobs_tensors, tokens.numel(), places, ids, scores),
    )


def _first_rows(drafts: SpecDecodeMetadata) -> np.ndarray:  # [B]
    counts = np.array(drafts.num_draft_tokens) + 1
    return np.cumsum(counts) - counts


def _joined(parts: list[MemberLogits], rows: torch.Tensor) -> MemberLogits:
    if len(parts) == 1:
        return parts[0].select(rows)
    members = [torch.cat(member) for member in zip(*(part.members for part in parts))]
    return replace(parts[0], members=members).select(rows)
