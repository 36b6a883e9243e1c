"""One request, token by token: the base writes elsewhere, the pair overrules it here.

The base streams its own greedy continuation, and at each token the pair says what the steered
choice is. Where both agree the stream goes on; where the pair overrules the base, the stream is
closed and a new one starts behind the steered token. So round trips are corrections + 1.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

import numpy as np
from vllm.sampling_params import SamplingParams

from proxy_vllm.remote_base.bounds import BaseRow, SteeredRow
from proxy_vllm.remote_base.endpoint import Endpoint
from proxy_vllm.remote_base.sampling import Adjustments, draw
from proxy_vllm.remote_base.usage import BaseUnavailable, Usage

# Tokens that are asked about in the first extra question; each next one asks for four times more.
_FIRST_QUESTION = 16
_LARGEST_QUESTION = 128  # vLLM's own limit for logprob_token_ids
# OpenAI's logit_bias takes values between -100 and 100.
_BIAS = 100.0
# Tokens that are compared along with a draft's row, those that the pair raises most.
_COMPARED = 300
# In exact mode, a sampled token's distribution may leave out so much.
_ENOUGH_MASS = 1e-3

# The pair's shift `alpha * (e - a)` of every token [V] after some tokens, up to a constant.
Shift = Callable[[Sequence[int]], Awaitable[np.ndarray]]
# The expert's own continuation after some tokens, so many of them.
Draft = Callable[[Sequence[int], int], Awaitable[list[int]]]


@dataclass
class Choice:
    """One token of the answer.

    Attributes:
        token: its id.
        certified: greedy: it is the steered argmax for certain. Drawn: it came from the whole
            steered distribution.
        cut_mass: the steered probability of tokens that were not known is at most this.
        ids, logprobs: the known tokens ``[k]`` with their steered log-probabilities.
    """

    token: int
    certified: bool
    cut_mass: float
    ids: np.ndarray
    logprobs: np.ndarray


@dataclass
class Steering:
    """What one request needs to be answered.

    Args:
        endpoint: of the base.
        shift: of the local pair, with the request's alpha.
        draft: of the local pair; None for no drafts.
        params: of the request.
        prompt: token ids.
        vocab_size: of the pair.
        seed: of draws.
        end_token: what an end of the base stands for where it reports none.
    """

    endpoint: Endpoint
    shift: Shift
    draft: Draft | None
    params: SamplingParams
    prompt: list[int]
    vocab_size: int
    seed: int
    end_token: int | None = None
    usage: Usage = field(default_factory=Usage)

    def __post_init__(self) -> None:
        self._adjustments = Adjustments(self.params, self.vocab_size)
        self._exact = self.endpoint.settings.mode == "exact"

    async def choices(self, max_tokens: int) -> AsyncGenerator[Choice, None]:
        """Tokens of the answer, until the caller has had enough.

        Raises:
            BaseUnavailable: the endpoint did not answer.
        """
        output: list[int] = []
        while len(output) < max_tokens:
            before = len(output)
            self.usage.trips += 1
            async with (
                self.endpoint.trips,
                aclosing(self._one_trip(output, max_tokens)) as trip,
            ):
                async for choice in trip:
                    output.append(choice.token)
                    self.usage.tokens += 1
                    self.usage.certified += choice.certified
                    yield choice
            if len(output) == before:
                yield self._base_ended()
                return

    async def _one_trip(self, output: list[int], max_tokens: int) -> AsyncGenerator[Choice, None]:
        """Tokens until the pair overrules the base, or the base's answer ends."""
        endpoint, started = self.endpoint, len(output)
        if not endpoint.continues and output:
            raise BaseUnavailable(
                "the base's endpoint answers messages and cannot go on after a steered token: ask"
                " for max_tokens=1, or use its completions route"
            )
        ids = [*self.prompt, *output]
        exact_reading = endpoint.reads_alike(ids)
        # While the base's answer travels, the pair works on the same position.
        shift = asyncio.ensure_future(self.shift(ids))
        rows = self._rows(ids, output, max_tokens - started)
        try:
            async with aclosing(rows):
                async for row, expected in rows:
                    choice = await self._choose(ids, output, row, await shift)
                    choice.certified = choice.certified and exact_reading
                    yield choice  # the caller appends it to `output`
                    if choice.token != expected:
                        return
                    ids = [*self.prompt, *output]
                    if len(output) < max_tokens:
                        shift = asyncio.ensure_future(self.shift(ids))
        except BaseUnavailable:
            # A stream that broke off has brought tokens: the next trip goes on behind them.
            if len(output) == started:
                raise
        finally:
            shift.cancel()

    async def _rows(
        self, ids: list[int], output: list[int], left: int
    ) -> AsyncGenerator[tuple[BaseRow, int | None], None]:
        """Rows of the base, each with the token that the next row comes after.

        Drafts of the expert come first: the base scores all of them at once, and writes on behind
        the last one at the same time.
        """
        endpoint = self.endpoint
        if not endpoint.continues:
            yield await endpoint.row(ids, self.usage), None
            return
        drafts: list[int] = []
        count = min(endpoint.settings.drafts, left - 1)
        if self.draft is not None and count > 0:
            drafts = await self.draft(ids, count)
        prefixes = [drafts[:i] for i in range(len(drafts))]
        stream = endpoint.rows([*ids, *drafts], left - len(drafts), self.usage)
        async with aclosing(stream):
            if drafts:
                first = asyncio.ensure_future(anext(stream, None))
                try:
                    scored = await self._scored(ids, list(output), prefixes)
                    for row, token in zip(scored, drafts):
                        yield row, token
                    after = await first
                finally:
                    first.cancel()
                    await asyncio.gather(first, return_exceptions=True)
                if after is None:
                    return
                yield after, after.token
            async for row in stream:
                yield row, row.token

    async def _scored(
        self, ids: list[int], output: list[int], drafted: list[list[int]]
    ) -> list[BaseRow]:
        """The base's rows behind the drafts; where it can be, each with its question answered."""
        endpoint = self.endpoint
        if not (endpoint.settings.compares and self._exact and self.params.temperature == 0):
            return await endpoint.rows_after([[*ids, *tokens] for tokens in drafted], self.usage)

        async def compared(tokens: list[int]) -> BaseRow:
            after = [*ids, *tokens]
            shift = self._adjustments.apply(await self.shift(after), [*output, *tokens])
            raised = np.argsort(-shift)[: min(_COMPARED, endpoint.max_biases)]
            raised = raised[shift[raised] > shift[raised[0]] - _BIAS / 2]
            if not len(raised):
                return await endpoint.row(after, self.usage)
            return await endpoint.compared_row(after, _biases(raised, shift), self.usage)

        return list(await asyncio.gather(*map(compared, drafted)))

    def _base_ended(self) -> Choice:
        """The base's end where its row is not reported: taken as it is, and not certified."""
        if self.end_token is None:
            raise BaseUnavailable("the base's endpoint: its answer ended without a row")
        ids = np.array([self.end_token], dtype=np.int64)
        return Choice(self.end_token, False, 1.0, ids, np.zeros(1))

    async def _choose(
        self, ids: list[int], output: list[int], row: BaseRow, shift: np.ndarray
    ) -> Choice:
        steered = SteeredRow(row, self._adjustments.apply(shift, output))
        greedy = self.params.temperature == 0
        token: int | None = None
        if self._exact and not self._is_enough(steered):
            if greedy:
                token = await self._ask_argmax(ids, steered)
            if token is None and self.endpoint.can_ask_ids:
                steered = await self._ask_more(ids, steered)
        if token is None and not np.isfinite(steered.scores.max(initial=-np.inf)):
            raise BaseUnavailable(
                "the base's endpoint reports none of the tokens that this request allows"
                " (--base-mode exact asks about them where the endpoint can be asked)"
            )
        cut_mass = steered.cut_mass(1.0 if greedy else self.params.temperature)
        if greedy:
            best, certified = steered.greedy()
            if token is not None:
                best, certified = token, True
        else:
            noise = np.random.default_rng([self.seed, len(output)])
            best, certified = draw(steered, self.params, noise), cut_mass <= _ENOUGH_MASS
        return Choice(best, certified, cut_mass, steered.base.ids, steered.logprobs())

    def _is_enough(self, steered: SteeredRow) -> bool:
        """Whether nothing that is not known matters for the next token."""
        if self.params.temperature == 0:
            return not len(steered.challengers())
        return steered.cut_mass(self.params.temperature) <= _ENOUGH_MASS

    async def _ask_more(self, ids: list[int], steered: SteeredRow) -> SteeredRow:
        """Ask for the tokens that matter most, until enough is known or the limit is reached."""
        size = _FIRST_QUESTION
        for _ in range(self.endpoint.settings.max_questions):
            order = np.argsort(-steered.outside, kind="stable")
            asked = order[np.isfinite(steered.outside[order])][:size]
            if self.params.temperature == 0:
                asked = steered.challengers()[:size]
            if not len(asked):
                break
            known = await self.endpoint.ask(ids, asked, self.usage)
            steered = SteeredRow(steered.base.with_known(asked, known), steered.shift)
            if self._is_enough(steered):
                break
            size = min(4 * size, _LARGEST_QUESTION)
        return steered

    async def _ask_argmax(self, ids: list[int], steered: SteeredRow) -> int | None:
        """Let the endpoint compare: every token that may win gets its shift as a bias.

        All get a constant that keeps other tokens out. More tokens than one call takes are compared
        in several at the same time, and their winners in one more. None where that cannot be done.
        """
        known = steered.base.ids[steered.scores > -np.inf]
        candidates = np.concatenate([known, steered.challengers()])
        if not len(candidates):
            return None
        # Half of the range is for the distance to tokens without a bias.
        if np.ptp(steered.shift[candidates]) > _BIAS / 2:
            return None
        limit, most = self.endpoint.max_biases, self.endpoint.settings.max_questions
        if len(candidates) > limit * max(1, most - 1) or not most:
            return None
        while len(candidates) > 1:
            parts = np.array_split(candidates, -(-len(candidates) // limit))
            winners = await asyncio.gather(*(self._argmax(ids, steered, part) for part in parts))
            if any(winner not in part for winner, part in zip(winners, parts)):
                return None  # a base that is surer than the biases keep apart
            candidates = np.array(winners)
        return int(candidates[0])

    async def _argmax(self, ids: list[int], steered: SteeredRow, tokens: np.ndarray) -> int:
        return await self.endpoint.argmax(ids, _biases(tokens, steered.shift), self.usage)


def _biases(tokens: np.ndarray, shift: np.ndarray) -> dict[int, float]:
    """Biases that compare ``tokens`` by their steered scores, and keep all others out."""
    biases = shift[tokens] - shift[tokens].max() + _BIAS
    return dict(zip(tokens.tolist(), biases.tolist()))
