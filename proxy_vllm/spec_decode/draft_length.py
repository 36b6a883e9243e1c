"""How many tokens to draft in a step: what is accepted, against what a draft costs.

A step that drafts and verifies K tokens yields ``E(K) = 1 + a1 + a1 a2 + ...`` tokens, where ``aj``
is the share of drafts at position j that are right when those before them are. Its time is close to
``t0 + K t1``: a draft is one more forward of the expert, and one more row to verify, which costs
little while a step is bound by reading weights and as much as a row as soon as it is not. Both
lines are measured while requests run, for batches of like size. The K of the most tokens a second
is 0 where drafts lose.
"""

from dataclasses import dataclass, field

# What was seen this many steps ago counts by a factor of 1/e.
MEMORY = 200.0
# How many steps a line has to be seen before its measured slope outweighs the expected one.
TRUST = 4.0
# A step in so many drafts the most, so that what is not drafted stays measured.
PROBE = 64


@dataclass
class StepTime:
    """Decayed sums for a line through (drafts, seconds of a step)."""

    weight: float = 0.0
    drafts: float = 0.0
    squares: float = 0.0
    seconds: float = 0.0
    products: float = 0.0

    def observe(self, drafts: int, seconds: float) -> None:
        keep = 1 - 1 / MEMORY
        self.weight = self.weight * keep + 1
        self.drafts = self.drafts * keep + drafts
        self.squares = self.squares * keep + drafts * drafts
        self.seconds = self.seconds * keep + seconds
        self.products = self.products * keep + drafts * seconds

    def line(self, slope: float) -> tuple[float, float]:
        """Seconds without drafts, and of each.

        Args:
            slope: the expected share of a step without drafts that one draft takes.
        """
        if not self.weight:
            return 1.0, slope
        mean, seconds = self.drafts / self.weight, self.seconds / self.weight
        spread = self.squares - self.drafts * mean
        together = self.products - self.drafts * seconds
        # Seconds without drafts, if the expected share is right.
        start = seconds / (1 + slope * mean)
        each = (together + TRUST * slope * start) / (spread + TRUST)
        each = max(each, 0.0)
        return max(seconds - each * mean, 1e-9), each


@dataclass
class DraftLength:
    """Chooses K step by step.

    Args:
        most: the largest K.
        slope: the expected share of a step without drafts that one draft takes, from the cost
            model: the expert's part of the bytes that a step reads.
    """

    most: int
    slope: float
    accepted: list[float] = field(default_factory=list)
    drafted: list[float] = field(default_factory=list)
    times: dict[int, StepTime] = field(default_factory=dict)
    steps: int = 0

    def __post_init__(self) -> None:
        # One draft of each position was right and none wrong: begin by drafting.
        self.accepted = [1.0] * self.most
        self.drafted = [1.0] * self.most

    @staticmethod
    def _like(batch: int) -> int:
        """Batches of like size: up to 1, 2, 4, 8, ... requests."""
        return (batch - 1).bit_length()

    def observe_drafts(self, drafted: int, accepted: int) -> None:
        """Of one request in one step."""
        keep = 1 - 1 / MEMORY
        for j in range(min(accepted + 1, drafted, self.most)):  # what follows was not judged
            self.drafted[j] = self.drafted[j] * keep + 1
            self.accepted[j] = self.accepted[j] * keep + (j < accepted)

    def observe_step(self, batch: int, drafts: int, seconds: float) -> None:
        """Of a step that did nothing but draft and verify so many tokens for each request."""
        self.times.setdefault(self._like(batch), StepTime()).observe(drafts, seconds)

    def expected_tokens(self, drafts: int) -> float:
        total = share = 1.0
        for j in range(drafts):
            share *= self.accepted[j] / self.drafted[j]
            total += share
        return total

    def choose(self, batch: int) -> int:
        self.steps += 1
        if self.steps % PROBE == 0:
            return self.most
        start, each = self.times.get(self._like(batch), StepTime()).line(self.slope)
        return max(range(self.most + 1), key=lambda k: self.expected_tokens(k) / (start + each * k))
