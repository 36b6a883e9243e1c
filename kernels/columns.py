"""Which tokens the columns of a trio's logits are, and how the formula reaches each."""

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Columns:
    """Tokens of the base's columns that one device holds; counts are of all shards together.

    - Columns before ``shared``, which all three members have: the formula.
    - From there to ``named``, which the base alone has: see `reference.combine`.
    - From ``named`` on, which no tokenizer names: never drawn, unless alpha is 0.
    """

    start: int  # token of the first column
    total: int  # columns of the base
    shared: int
    named: int

    @classmethod
    def of(
        cls,
        base: torch.Tensor,  # [B, V], unsharded
        expert: torch.Tensor,
        antiexpert: torch.Tensor,
        named: int | None = None,
    ) -> "Columns":
        """Of whole logits; ``named`` None: a tokenizer names every column of the base."""
        total = base.shape[1]
        named = total if named is None else min(named, total)
        return cls(0, total, min(named, expert.shape[1], antiexpert.shape[1]), named)

    @property
    def some_missing(self) -> bool:
        """Whether the base has tokens that a small member lacks."""
        return self.shared < self.named

    def local(self, count: int, width: int) -> int:
        """How many of this device's ``width`` columns are among the first ``count`` tokens."""
        return min(width, max(0, count - self.start))


def log_sums(
    expert: torch.Tensor,  # [B, n], columns that all three members have
    antiexpert: torch.Tensor,  # [B, n]
) -> torch.Tensor:  # [B, 2]
    """Log-sum-exp of each small member over the tokens that neither forbids."""
    forbidden = expert.isinf() | antiexpert.isinf()
    members = (member.masked_fill(forbidden, -torch.inf) for member in (expert, antiexpert))
    return torch.stack([member.logsumexp(1) for member in members], dim=1)


def shift_of_missing(
    expert: torch.Tensor,  # [B, n_e], this rank's columns
    antiexpert: torch.Tensor,  # [B, n_a]
    columns: Columns,
    gather: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor[None],
) -> torch.Tensor | None:  # [B] float32
    """Shift of the base's tokens that a small member lacks; None where they lack none.

    PyTorch's passes over the small members' logits, which no other trio pays for. `gather` gives
    what all ranks passed to it, stacked.
    """
    if not columns.some_missing:
        return None
    shared = columns.local(columns.shared, min(expert.shape[1], antiexpert.shape[1]))
    e, a = (member[:, :shared].float() for member in (expert, antiexpert))
    sums = gather(log_sums(e, a)).logsumexp(dim=0)
    return sums[:, 0] - sums[:, 1]
