"""In vLLM's front end: a request's explanations, taken from the columns beside log-probabilities.

They ride on the positions of ``CompletionOutput.logprobs``, which vLLM slices, merges and streams.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from vllm.logprobs import Logprob, LogprobsOnePosition
from vllm.outputs import CompletionOutput
from vllm.tokenizers.detokenizer_utils import convert_ids_list_to_tokens
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.logprobs import LogprobsProcessor
from vllm.v1.engine.output_processor import OutputProcessor
from vllm.v1.outputs import LogprobsLists

from proxy_vllm.config import ProxyConfig
from proxy_vllm.errors import UserError
from proxy_vllm.explain.columns import Block, split
from proxy_vllm.explain.request import ALONE_KEY, top_of
from proxy_vllm.explain.tokens import TokenExplanation, candidate


class ExplainedPosition(dict[int, Logprob]):
    """vLLM's log-probabilities of one position, and what steering did there."""

    explanation: TokenExplanation


def explanations(output: CompletionOutput) -> list[TokenExplanation]:
    """What steering did to each token of an answer, or of a streamed part of it.

    Args:
        output: of a request with ``extra_args={"proxy_explain": True}``; of others the list is
            empty.
    """
    positions = output.logprobs or ()
    return [p.explanation for p in positions if isinstance(p, ExplainedPosition)]


class Texts:
    """Texts of tokens, each decoded once."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.known: dict[int, str] = {}

    def of(self, token_ids: list[int]) -> list[str]:
        if self.tokenizer is None:
            return [""] * len(token_ids)
        new = [i for i in dict.fromkeys(token_ids) if i not in self.known]
        self.known.update(zip(new, convert_ids_list_to_tokens(self.tokenizer, new)))
        return [self.known[i] for i in token_ids]


@dataclass
class ExplainingProcessor(LogprobsProcessor):
    """vLLM's processor of one request's log-probabilities, for a request that asks."""

    alpha: float = 1.0
    top: int = 1
    # Whether the request wants log-probabilities too.
    wants_logprobs: bool = False
    texts: Texts = field(default_factory=lambda: Texts(None))

    def _update_sample_logprobs(self, logprobs_lists: LogprobsLists) -> None:
        plain, block = split(logprobs_lists)
        assert isinstance(self.logprobs, list)
        first = len(self.logprobs)
        if self.wants_logprobs:
            super()._update_sample_logprobs(plain)
        for i in range(len(block.ids)):
            before = self.logprobs[max(0, first + i - 4) : first + i]
            explanation = self._explain(block, i, before)
            chosen = explanation.chosen
            if not self.wants_logprobs:
                own = Logprob(float(block.scores[i, 0, 0]), None, chosen.token)
                self.logprobs.append({chosen.token_id: own})
            position = ExplainedPosition(self.logprobs[first + i])
            position.explanation = explanation
            self.logprobs[first + i] = position

    def _explain(
        self, block: Block, row: int, before: list[LogprobsOnePosition]
    ) -> TokenExplanation:
        """Explain one position.

        Args:
            block, row: where its values stand.
            before: positions before it, for characters that are spread over tokens.
        """
        ids: list[int] = block.ids[row].tolist()
        scores: list[list[float]] = block.scores[row].T.tolist()
        # A batch has as many columns as its most demanding row.
        most = (len(ids) - 1) // 2
        steered, base = (range(start, start + min(self.top, most)) for start in (1, 1 + most))
        places = {ids[place]: place for place in (0, *steered, *base)}
        texts = dict(zip(places, self.texts.of(list(places)), strict=True))
        if self.tokenizer is not None and texts[ids[0]].endswith("\ufffd"):
            context = self._get_sampled_context_ids(before)
            texts[ids[0]] = self._correct_decoded_token(ids[0], context)
        found = {i: candidate(texts[i], i, scores[place]) for i, place in places.items()}
        order = sorted(places, key=lambda i: -scores[places[i]][0])
        return TokenExplanation(
            chosen=found[ids[0]],
            alpha=self.alpha,
            base_choice=ids[1 + most],
            steered_choice=ids[1],
            top=tuple(found[i] for i in order),
        )


class ExplainingOutputProcessor(OutputProcessor):
    """vLLM's output processor, which gives requests that ask a processor of their own.

    Args:
        processor: vLLM's, whose state is shared: an engine's output task holds on to it.
        proxy: tells a request's alpha.
    """

    def __init__(self, processor: OutputProcessor, proxy: ProxyConfig) -> None:
        self.__dict__ = processor.__dict__
        self.proxy_config = proxy
        self.texts = Texts(self.tokenizer)

    def add_request(self, request: EngineCoreRequest, *args: Any, **kwargs: Any) -> None:
        super().add_request(request, *args, **kwargs)
        params = request.sampling_params
        if params is None:
            return
        try:
            top, alpha = top_of(params.extra_args), self.proxy_config.alpha_of(params.extra_args)
        except UserError:  # it came in past our checks, and runs without
            return
        state = self.request_states[request.request_id]
        plain = state.logprobs_processor
        if top is None or plain is None or isinstance(plain, ExplainingProcessor):
            return
        extra = dict(params.extra_args or {})
        # One of several answers to a prompt may share its parameters with those before it.
        alone = extra.setdefault(ALONE_KEY, params.num_logprobs is None)
        params.extra_args = extra
        own = {f.name: getattr(plain, f.name) for f in dataclasses.fields(LogprobsProcessor)}
        if alone:
            # The scheduler passes on rows of log-probabilities to requests that ask for some.
            params.logprobs = 0
            own |= {"logprobs": [], "num_logprobs": None, "cumulative_logprob": None}
        state.logprobs_processor = ExplainingProcessor(
            **own, alpha=alpha, top=top, wants_logprobs=not alone, texts=self.texts
        )


def let_explain(engine: Any, proxy: ProxyConfig) -> None:
    """Let requests of vLLM's ``LLMEngine`` or ``AsyncLLM`` be explained, from now on."""
    if not isinstance(engine.output_processor, ExplainingOutputProcessor):
        engine.output_processor = ExplainingOutputProcessor(engine.output_processor, proxy)


def positions(outputs: list[CompletionOutput]) -> Iterator[tuple[int, TokenExplanation]]:
    """Explanations in outputs, each with its output's index."""
    for output in outputs:
        for explanation in explanations(output):
            yield output.index, explanation
