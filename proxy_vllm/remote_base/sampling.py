"""Sampling parameters on a steered row: what can be computed without the base's whole row.

All that adds to logits becomes part of the shift, so that the bounds of ``bounds.py`` hold for it:
presence and frequency penalties, biases, bad words, allowed tokens and minimum tokens. A repetition
penalty multiplies logits, and an endpoint gives them only up to a constant of the row.
"""

import numpy as np
from vllm.sampling_params import SamplingParams

from proxy_vllm.errors import UserError
from proxy_vllm.remote_base.bounds import SteeredRow


def check_parameters(params: SamplingParams) -> None:
    """Refuse by name what cannot be computed for a base of which only the top is known.

    Raises:
        UserError: naming the parameter.
    """
    refused = {
        "repetition_penalty": params.repetition_penalty != 1.0,
        "prompt_logprobs": params.prompt_logprobs is not None,
        "prompt_logprob_token_ids": getattr(params, "prompt_logprob_token_ids", None) is not None,
        "logprob_token_ids": params.logprob_token_ids is not None,
        "structured_outputs (response_format, guided tool choice)": (
            params.structured_outputs is not None
        ),
        "logprobs=-1": params.logprobs == -1,
    }
    for name, asked in refused.items():
        if asked:
            raise UserError(
                f"{name} needs the base's whole distribution, of which an endpoint reports the"
                " top: leave it out, or run the base here"
            )


class Adjustments:
    """What one request's parameters add to every row's shift."""

    def __init__(self, params: SamplingParams, vocab_size: int) -> None:
        self.params = params
        self.fixed = np.zeros(vocab_size)
        if params.allowed_token_ids:
            self.fixed[:] = -np.inf
            self.fixed[list(params.allowed_token_ids)] = 0.0
        for token, bias in (params.logit_bias or {}).items():
            self.fixed[int(token)] += bias
        self.bad_words = [list(word) for word in params.bad_words_token_ids or []]
        ends = {params.eos_token_id, *(params.all_stop_token_ids or ())}
        self.ends = [t for t in ends if t is not None and 0 <= t < vocab_size]

    def apply(self, shift: np.ndarray, output: list[int]) -> np.ndarray:
        """A new shift ``[V]`` for the token after ``output``, the tokens generated so far."""
        params, shift = self.params, shift + self.fixed
        if output and (params.presence_penalty or params.frequency_penalty):
            tokens, counts = np.unique(output, return_counts=True)
            shift[tokens] -= params.presence_penalty + params.frequency_penalty * counts
        for word in self.bad_words:
            before = word[:-1]
            if not before or output[-len(before) :] == before:
                shift[word[-1]] = -np.inf
        if len(output) < params.min_tokens:
            shift[self.ends] = -np.inf
        return shift


def draw(row: SteeredRow, params: SamplingParams, noise: np.random.Generator) -> int:
    """One token from the steered distribution over the known tokens.

    Temperature, then min-p, top-k and top-p, in vLLM's order.
    """
    probs = row.distribution(params.temperature)
    if params.min_p > 0:
        probs = np.where(probs < params.min_p * probs.max(), 0.0, probs)
    order = np.argsort(-probs, kind="stable")
    keep = len(order) if params.top_k <= 0 else min(params.top_k, len(order))
    if params.top_p < 1:
        # Every token before which less than top_p has been collected.
        before = np.cumsum(probs[order]) - probs[order]
        keep = min(keep, int((before < params.top_p * probs.sum()).sum()))
    kept = order[: max(keep, 1)]
    weights = probs[kept]
    return int(row.base.ids[noise.choice(kept, p=weights / weights.sum())])
