"""What a base's top log-probabilities tell about the steered distribution, and how surely.

The endpoint reports the base's log-probability ``b_v`` for the tokens of a set ``S``, the likeliest
ones. The local pair knows the shift ``d_v = alpha * (e_v - a_v)`` of every token, and the steered
score is ``s_v = b_v + d_v`` up to a constant of the row. For every token outside ``S``

    b_v <= bound = min(smallest b of S, log(1 - sum of exp(b) over S))

since such a token is no likelier than the least reported one, and no likelier than what is left. So
``s_v <= bound + d_v``, which the pair can compute: a token of ``S`` that beats this for all others
is the steered argmax for certain, and the mass outside ``S`` is bounded the same way.
"""

from dataclasses import dataclass

import numpy as np

# Endpoints compute and round in 32 bits: two scores nearer than this are not told apart.
MARGIN = 1e-4
_REST_ERROR = 1e-6  # of `1 - sum`, for each reported token


@dataclass
class BaseRow:
    """What an endpoint told about the base's next token.

    Attributes:
        ids: token ids ``[k]``, without repetition.
        logprobs: their log-probabilities ``[k]`` under the base.
        ceiling: no token outside ``ids`` has a larger log-probability. The smallest reported one,
            or 0 where likelier tokens may be missing (two tokens with one text, for example).
        token: the base's own choice, if the endpoint named it.
        beaten: token ids ``[n]`` whose steered score is not above that of ``token``: the endpoint
            added their shifts and compared them.
    """

    ids: np.ndarray  # [k] int64
    logprobs: np.ndarray  # [k] float64
    ceiling: float = 0.0
    token: int | None = None
    beaten: np.ndarray | None = None  # [n] int64

    @classmethod
    def of_top(cls, ids: np.ndarray, logprobs: np.ndarray, token: int | None = None) -> "BaseRow":
        """A row of the likeliest tokens, none of them missing."""
        return cls(ids, logprobs, float(logprobs.min(initial=0.0)), token)

    @property
    def rest(self) -> float:
        """An upper bound of the base's probability of all other tokens."""
        known = np.exp(self.logprobs).sum()
        return float(max(0.0, 1.0 - known) + _REST_ERROR * len(self.ids))

    @property
    def bound(self) -> float:
        """An upper bound of the log-probability of every token outside ``ids``."""
        return min(self.ceiling, float(np.log(self.rest)))

    def with_known(self, ids: np.ndarray, logprobs: np.ndarray) -> "BaseRow":
        """The row with the log-probabilities of more tokens, which an extra question gave."""
        new = ~np.isin(ids, self.ids)
        return BaseRow(
            np.concatenate([self.ids, ids[new]]),
            np.concatenate([self.logprobs, logprobs[new]]),
            self.ceiling,
            self.token,
            self.beaten,
        )

    def after_comparison(self, compared: np.ndarray) -> "BaseRow":
        """The row of an answer whose ``token`` won among ``compared``, each with its shift added.

        The winner is reported though it may be none of the likeliest, so the others alone say how
        likely a token can be that is not reported.
        """
        ceiling = 0.0
        if self.ceiling < 0:
            ceiling = float(self.logprobs[self.ids != self.token].min(initial=0.0))
        # A base that is surer than the biases keep apart chose another token.
        won = self.token in compared and self.token in self.ids
        return BaseRow(self.ids, self.logprobs, ceiling, self.token, compared if won else None)


class SteeredRow:
    """The steered scores of one position, as far as a base's row tells.

    Args:
        base: what the endpoint reported.
        shift: what is added to the base's log-probability of every token ``[V]``: the pair's shift,
            and penalties or biases of the request. ``-inf`` keeps a token out.
    """

    def __init__(self, base: BaseRow, shift: np.ndarray) -> None:
        self.base, self.shift = base, shift
        self.scores = base.logprobs + shift[base.ids]
        self.bound = base.bound
        # Upper bounds of the scores outside; what is inside is left out of them.
        self._shift_outside = shift.copy()
        self._shift_outside[base.ids] = -np.inf
        self.outside = self.bound + self._shift_outside
        # Tokens outside that may still win. Those that lost to a known token do not.
        self._open = self.outside
        if base.beaten is not None:
            winner = self.scores[base.ids == base.token].max()
            self.outside[base.beaten] = np.minimum(self.outside[base.beaten], winner)
            self._open = self.outside.copy()
            self._open[base.beaten] = -np.inf

    @property
    def covers_all(self) -> bool:
        return len(self.base.ids) >= len(self.shift)

    def best(self) -> int:
        """Index into ``base.ids`` of the best known token; the smaller id where two are equal."""
        top = np.flatnonzero(self.scores == self.scores.max())
        return int(top[np.argmin(self.base.ids[top])])

    def greedy(self) -> tuple[int, bool]:
        """The best token that is known, and whether it is the steered argmax for certain."""
        best = self.best()
        score = self.scores[best]
        others = np.delete(self.scores, best)
        certain = np.isfinite(score) and score > self._open.max(initial=-np.inf) + MARGIN
        certain = certain and score > others.max(initial=-np.inf) + MARGIN
        return int(self.base.ids[best]), bool(certain)

    def challengers(self) -> np.ndarray:
        """Token ids outside that could still beat the best known one, the likeliest first."""
        score = self.scores[self.best()]
        ids = np.flatnonzero(self._open + MARGIN >= score)
        ids = ids[np.isfinite(self._open[ids])]
        return ids[np.argsort(-self._open[ids], kind="stable")]

    def cut_mass(self, temperature: float = 1.0) -> float:
        """An upper bound of the steered probability of all tokens that are not known.

        Args:
            temperature: of the request; scores are divided by it.
        """
        if self.covers_all:
            return 0.0
        # Relative to the largest score, since exp overflows.
        top = max(self.scores.max(initial=-np.inf), self.outside.max(initial=-np.inf))
        if not np.isfinite(top):
            return 0.0
        inside = np.exp((self.scores - top) / temperature).sum()
        each = np.exp((self.outside - top) / temperature)
        outside = each.sum()
        if temperature == 1.0:
            # The unknown tokens share `rest`: worst where those that are raised most hold it.
            order = np.argsort(-self._shift_outside)
            share = np.minimum(np.exp(self.bound), self._shares_left(len(order)))
            weights = share * np.exp(self._shift_outside[order] - top)
            outside = min(outside, weights.sum())
        return float(outside / (outside + inside))

    def _shares_left(self, count: int) -> np.ndarray:
        """What is left of ``rest`` for the n-th token if those before it took the most they can."""
        taken = np.exp(self.bound) * np.arange(count)
        return np.maximum(0.0, self.base.rest - taken)

    def distribution(self, temperature: float) -> np.ndarray:
        """Probabilities ``[k]`` of the known tokens, renormalised over them."""
        scaled = self.scores / temperature
        weights = np.exp(scaled - scaled.max())
        return weights / weights.sum()

    def logprobs(self) -> np.ndarray:
        """Steered log-probabilities ``[k]`` of the known tokens, renormalised over them."""
        top = self.scores.max(initial=-np.inf)
        if not np.isfinite(top):
            return self.scores
        return self.scores - (top + np.log(np.exp(self.scores - top).sum()))
