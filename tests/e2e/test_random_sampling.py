"""Sampling at a temperature: seeds, n > 1, and the distribution that tokens are drawn from.

A Transformers loop cannot draw vLLM's random numbers, so the truth is either an exact identity
between requests, or the probabilities that the loop's logits define.
"""

from collections import Counter
from typing import Any

import pytest
import torch
from engines import RUNNER, prompt_ids, running
from reference_loop import Trio, greedy, prompt_logits

PROMPT = prompt_ids([33], seed=5)[0]
OTHERS = prompt_ids([5, 40, 21], seed=6)
DRAWS = 1024 if RUNNER == "v1" else 128


@pytest.fixture(scope="module")
def reference(trio) -> Trio:
    return Trio.load(trio["model"], trio["expert"], trio["antiexpert"], torch.float32)


@pytest.fixture(scope="module")
def llm(trio):
    with running(**trio, max_num_seqs=64, max_num_batched_tokens=128) as engine:
        yield engine


def sampled(alpha: float = 1.0, **fields: Any) -> Any:
    from vllm import SamplingParams

    fields = {"temperature": 1.0, "max_tokens": 12, "ignore_eos": True, **fields}
    return SamplingParams(extra_args={"proxy_alpha": alpha}, **fields)


def generate(llm, requests: list[tuple[list[int], Any]]) -> list[list[list[int]]]:
    """Token ids of every completion of every request."""
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt, _ in requests],
        [params for _, params in requests],
        use_tqdm=False,
    )
    return [[list(c.token_ids) for c in output.outputs] for output in outputs]


def test_a_seed_gives_the_same_tokens_whatever_shares_the_batch(llm):
    crowd = [(p, sampled(alpha=-1.0, temperature=2.0)) for p in OTHERS]
    alone = generate(llm, [(PROMPT, sampled(0.5, seed=7))])[0]
    first, *_, again, other_seed, other_alpha = generate(
        llm,
        [
            (PROMPT, sampled(0.5, seed=7)),
            *crowd,
            (PROMPT, sampled(0.5, seed=7)),
            (PROMPT, sampled(0.5, seed=8)),
            (PROMPT, sampled(2.5, seed=7)),
        ],
    )
    assert first == again == alone
    assert other_seed != alone
    assert other_alpha != alone


def test_n_completions_are_those_of_consecutive_seeds(llm):
    """vLLM gives the i-th completion the request's seed plus i; alpha goes to each of them."""
    together, *single = generate(
        llm,
        [
            (PROMPT, sampled(1.5, seed=20, n=3)),
            *((PROMPT, sampled(1.5, seed=20 + i)) for i in range(3)),
        ],
    )
    assert len(together) == 3
    assert together == [completions[0] for completions in single]
    assert len({tuple(tokens) for tokens in together}) == 3


def test_greedy_and_sampled_requests_share_a_batch(llm, reference):
    outputs = generate(
        llm,
        [
            (PROMPT, sampled(0.5, temperature=0.0)),
            (PROMPT, sampled(0.5, seed=3)),
            (OTHERS[1], sampled(-1.0, temperature=0.0)),
        ],
    )
    assert outputs[0][0] == greedy(reference, PROMPT, 12, 0.5)[0]
    assert outputs[2][0] == greedy(reference, OTHERS[1], 12, -1.0)[0]
    assert outputs[1][0] != outputs[0][0]


def probabilities(
    logits: torch.Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> torch.Tensor:  # [V] -> [V] float64
    """What a token is drawn from: temperature, then min-p, then top-k, then top-p."""
    probs = (logits.double() / temperature).softmax(-1)
    probs[probs < min_p * probs.max()] = 0
    if top_k:
        probs[probs < probs.topk(top_k).values[-1]] = 0
    probs /= probs.sum()
    ordered, index = probs.sort(descending=True)
    probs[index[ordered.cumsum(-1) - ordered >= top_p]] = 0
    return probs / probs.sum()


slow_in_interpreter = pytest.mark.skipif(
    RUNNER == "v2",
    reason="half a minute in Triton's interpreter; test_fused_sampler.py proves its draws exactly",
)
DISTRIBUTIONS = [
    {"temperature": 0.8},
    pytest.param({"temperature": 1.3, "min_p": 0.1}, marks=slow_in_interpreter),
    pytest.param({"temperature": 1.0, "top_k": 7}, marks=slow_in_interpreter),
    pytest.param({"temperature": 1.5, "top_p": 0.8}, marks=slow_in_interpreter),
    {"temperature": 1.5, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
]


def p_value(counts: Counter, expected: torch.Tensor) -> float:
    """Chi-squared test of counts against [V] probabilities, rare tokens taken together."""
    from scipy.stats import chisquare

    if any(expected[token] == 0 for token in counts):
        return 0.0
    total = counts.total()
    common = [i for i, p in enumerate(expected.tolist()) if p * total >= 5]
    observed = [counts[i] for i in common]
    want = [float(expected[i]) * total for i in common]
    if total - sum(want) >= 5:
        observed, want = [*observed, total - sum(observed)], [*want, total - sum(want)]
    scale = sum(observed) / sum(want)  # a few rare tokens may be in no cell
    return float(chisquare(observed, [w * scale for w in want]).pvalue)


@pytest.mark.parametrize("fields", DISTRIBUTIONS, ids=lambda f: "-".join(map(str, f)))
def test_tokens_are_drawn_from_the_combined_distribution(fields, llm, reference):
    probs = probabilities(prompt_logits(reference, PROMPT, 0.4)[-1], **fields)
    other = probabilities(prompt_logits(reference, PROMPT, 1.0)[-1], **fields)
    (completions,) = generate(
        llm, [(PROMPT, sampled(0.4, **fields, n=DRAWS, seed=1000, max_tokens=1))]
    )
    counts = Counter(tokens[0] for tokens in completions)
    assert p_value(counts, probs) > 1e-3
    assert p_value(counts, other) < 1e-6, "the test would not tell alpha 0.4 from alpha 1"


def test_streaming(llm, reference):
    """Pieces add up to the whole, arrive one step at a time, and mix with other requests."""
    from vllm.sampling_params import RequestOutputKind

    engine = llm.llm_engine
    asked = {"0.5": (PROMPT, 0.5), "-1": (OTHERS[2], -1.0)}
    for request_id, (prompt, alpha) in asked.items():
        params = sampled(alpha, temperature=0.0)
        params.output_kind = RequestOutputKind.DELTA
        engine.add_request(request_id, {"prompt_token_ids": prompt}, params)
    pieces: dict[str, list[Any]] = {request_id: [] for request_id in asked}
    while engine.has_unfinished_requests():
        for output in engine.step():
            pieces[output.request_id].append(output)
    tokenizer = llm.get_tokenizer()
    for request_id, (prompt, alpha) in asked.items():
        want, _ = greedy(reference, prompt, 12, alpha)
        got = pieces[request_id]
        assert len(got) == 12
        assert [t for piece in got for t in piece.outputs[0].token_ids] == want
        text = "".join(piece.outputs[0].text for piece in got)
        assert text.strip() == tokenizer.decode(want)
        assert [piece.finished for piece in got] == [False] * 11 + [True]
