"""What the endpoint was asked and what that costs, with limits that stop before more is spent."""

import time
from dataclasses import asdict, dataclass, field, fields
from functools import cache

from prometheus_client import Counter

from proxy_vllm.errors import UserError


class BaseUnavailable(Exception):
    """The base's endpoint did not answer a request, or must not be asked any more."""


@dataclass(frozen=True)
class Price:
    """US dollars for a million tokens."""

    prompt: float
    completion: float
    cached: float | None = None  # of the prompt, where the endpoint says which were

    @classmethod
    def parse(cls, text: str) -> "Price":
        """Read ``PROMPT,COMPLETION[,CACHED]``.

        Raises:
            UserError: anything else.
        """
        try:
            numbers = [float(part) for part in text.split(",")]
            if len(numbers) not in (2, 3) or min(numbers) < 0:
                raise ValueError
        except ValueError:
            raise UserError(
                f"--price {text}: dollars for a million tokens, PROMPT,COMPLETION[,CACHED]"
            ) from None
        return cls(*numbers)


@dataclass
class Usage:
    """Counts of one request, or of all.

    Attributes:
        trips: waits for the endpoint, one after another; a stream that is read on is one.
        calls: HTTP requests, retries not counted.
        questions: calls that asked for more of a row than the first answer told.
        tokens: tokens of answers.
        certified: of them, those that are the exact ones for certain.
        prompt_tokens, cached_tokens, completion_tokens: as the endpoint counts them; of a stream
            that was closed early, what was sent and received.
    """

    trips: int = 0
    calls: int = 0
    questions: int = 0
    tokens: int = 0
    certified: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0

    def add(self, other: "Usage") -> None:
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)

    def cost(self, price: Price) -> float:
        """US dollars."""
        cached = price.prompt if price.cached is None else price.cached
        fresh = self.prompt_tokens - self.cached_tokens
        dollars = fresh * price.prompt + self.cached_tokens * cached
        return (dollars + self.completion_tokens * price.completion) / 1e6

    def report(self, price: Price | None = None) -> dict[str, float]:
        out = {**asdict(self), "tokens_a_trip": round(self.tokens / max(self.trips, 1), 3)}
        return out if price is None else {**out, "dollars": round(self.cost(price), 6)}


@cache
def counters() -> dict[str, Counter]:
    """The counters of ``/metrics``, which are listed there from the first call on."""
    return {
        field.name: Counter(
            f"proxy_vllm:remote_base_{field.name}", f"{field.name} of a base elsewhere"
        )
        for field in fields(Usage)
    }


def count_in_metrics(usage: Usage) -> None:
    """Add what a request used to the counters of ``/metrics``."""
    for name, value in asdict(usage).items():
        counters()[name].inc(value)


@dataclass
class Guard:
    """Stops calls when a limit is reached, or for a while when the endpoint fails again and again.

    Args:
        max_calls: HTTP requests in all; None for no limit.
        max_cost: US dollars in all, by ``price``.
        failures: so many calls that failed one after another open the circuit.
        pause: for so many seconds, then one call tries again.
    """

    max_calls: int | None = None
    max_cost: float | None = None
    price: Price | None = None
    failures: int = 5
    pause: float = 30.0
    usage: Usage = field(default_factory=Usage)
    _failed: int = 0
    _closed_at: float = 0.0

    def check(self) -> None:
        """Raise ``BaseUnavailable`` if no call may be made now."""
        if self.max_calls is not None and self.usage.calls >= self.max_calls:
            raise BaseUnavailable(f"the limit of {self.max_calls} calls is reached")
        cost = None if self.price is None else self.usage.cost(self.price)
        if self.max_cost is not None and cost is not None and cost >= self.max_cost:
            raise BaseUnavailable(f"the limit of {self.max_cost:g} dollars is reached")
        if self._failed >= self.failures:
            left = self._closed_at - time.monotonic()
            if left > 0:
                raise BaseUnavailable(
                    f"it failed {self._failed} times one after another, and is not asked for"
                    f" another {left:.0f} s"
                )
            self._closed_at = time.monotonic() + self.pause  # one call tries, the others wait

    def succeeded(self) -> None:
        self._failed = 0

    def failed(self) -> None:
        self._failed += 1
        self._closed_at = time.monotonic() + self.pause
