"""What steering did to one token, as users get it."""

import math
from dataclasses import asdict, dataclass
from typing import Any

# Digits after the point: a tenth of what the float32 sums behind them are exact to.
_DIGITS = 5


@dataclass(frozen=True, slots=True)
class Candidate:
    """One token at one position: its natural log-probabilities under four distributions.

    They are those of the logits, before temperature, penalties and filters. None: the model gives
    the token no probability, or does not have it.
    """

    token: str
    token_id: int
    steered: float | None
    base: float | None
    expert: float | None
    antiexpert: float | None


@dataclass(frozen=True, slots=True)
class TokenExplanation:
    """A token of an answer beside what stood in its place.

    Args:
        chosen: the token of the answer.
        alpha: the strength that it was steered by.
        base_choice: id of the token that the base ranks first.
        steered_choice: id of the token that the steered model ranks first.
        top: the chosen token and the first tokens of both, by ``steered`` from the largest on.
    """

    chosen: Candidate
    alpha: float
    base_choice: int
    steered_choice: int
    top: tuple[Candidate, ...]

    @property
    def changed(self) -> bool:
        """Whether steering changed which token comes first."""
        return self.base_choice != self.steered_choice

    @property
    def shift(self) -> float | None:
        """By how much steering raised the chosen token's log-probability."""
        steered, base = self.chosen.steered, self.chosen.base
        return None if steered is None or base is None else steered - base

    def to_dict(self) -> dict[str, Any]:
        """The form of docs/explain.md."""
        return {
            **asdict(self.chosen),
            "alpha": self.alpha,
            "base_choice": self.base_choice,
            "steered_choice": self.steered_choice,
            "changed": self.changed,
            "top": [asdict(candidate) for candidate in self.top],
        }


def candidate(token: str, token_id: int, values: list[float]) -> Candidate:
    """A candidate from its values in the order of ``scores.VIEWS``."""
    finite = [round(value, _DIGITS) if math.isfinite(value) else None for value in values]
    return Candidate(token, token_id, *finite)
