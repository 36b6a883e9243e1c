"""What drafts of the expert gain at best, beside the base alone and beside its fair peer.

A round drafts K tokens with the expert, one after another, and verifies them in one step of all
three members with K + 1 tokens a row. Drafts are accepted up to the first that is not the target's
own token. When each is accepted with probability a, whatever came before,

    tokens a round = 1 + a + a^2 + ... + a^K

The fair peer is the base alone with the same small model as its drafter: it pays for the drafts and
for its own verification, and nothing for the two small members in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from proxy_vllm.errors import UserError
from proxy_vllm.plan.model_size import ModelShape

if TYPE_CHECKING:
    from proxy_vllm.plan.roofline import StepFloor

MOST_TOKENS = 32
"""More drafts a round than any drafter gets accepted."""


@dataclass(frozen=True)
class Speculation:
    """Ceilings with K drafts a round, each accepted with one probability."""

    speculative_tokens: int
    acceptance: float
    tokens_per_round: float
    """Expected tokens of a row in a round."""
    round_ms: float
    tokens_per_s: float
    peer_tokens_per_s: float
    """Base alone with the expert's shape as its drafter, at the same acceptance."""


def expected_tokens(acceptance: float, drafts: int) -> float:
    """Tokens a round: the accepted drafts, and the target's own token after them."""
    return sum(acceptance**i for i in range(drafts + 1))


def speculation(
    members: Sequence[ModelShape],  # those that run, the base first
    drafter: ModelShape,
    floor: Callable[..., StepFloor],  # of members, with tokens_per_row
    *,
    batch: int,
    drafts: int,
    acceptance: float,
) -> Speculation:
    """Ceilings of drafts in place; `floor` is `step_floor` for the plan's GPU and load.

    Raises `UserError` for a count or a share that cannot be.
    """
    if not 1 <= drafts <= MOST_TOKENS:
        raise UserError(f"--speculative-tokens {drafts}: give a number from 1 to {MOST_TOKENS}")
    if not 0 <= acceptance <= 1:
        raise UserError(f"--acceptance {acceptance}: give a share from 0 to 1")
    base = members[0]
    draft_ms = drafts * floor([drafter]).step_ms
    round_ms = draft_ms + floor(members, tokens_per_row=drafts + 1).step_ms
    peer_ms = draft_ms + floor([base], tokens_per_row=drafts + 1).step_ms
    tokens = expected_tokens(acceptance, drafts)
    return Speculation(
        speculative_tokens=drafts,
        acceptance=acceptance,
        tokens_per_round=tokens,
        round_ms=round_ms,
        tokens_per_s=batch * tokens / round_ms * 1e3,
        peer_tokens_per_s=batch * tokens / peer_ms * 1e3,
    )
