"""Frequencies of drawn tokens against the float64 softmax of the filtered logits.

The interpreter draws tens of tokens a second, so on a CPU the default run draws 120,000 tokens of a
mixture with the reference, whose noise and kept sets are the kernels', and holds the kernels to the
same tokens at the first of those positions. `slow` and `gpu` tests draw from the kernels alone.
"""

import pytest
import torch
from scipy import stats

from proxy_vllm.kernels import reference
from proxy_vllm.kernels.combine_sample import proxy_sample

VOCAB = 37
MIXTURES = {
    "plain": {},
    "min-p": {"min_p": 0.05},
    "top-k": {"top_k": 9},
    "top-p": {"top_p": 0.8},
    "top-k, top-p": {"top_k": 12, "top_p": 0.9},
    "min-p, top-k, top-p": {"min_p": 0.02, "top_k": 20, "top_p": 0.95},
}
ALPHA, TEMPERATURE, SEED = 0.7, 0.9, 20_240_101


def row_of_logits() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(1, VOCAB, generator=generator) * 1.5 for _ in range(3)]


def parameters(filters, dtype=torch.float32):
    types = {"top_k": torch.int32}
    return {name: torch.tensor([v], dtype=types.get(name, dtype)) for name, v in filters.items()}


def expected(filters) -> torch.Tensor:
    one = [torch.tensor([ALPHA]), torch.tensor([TEMPERATURE])]
    return reference.probabilities(*row_of_logits(), *one, **parameters(filters))[0]


def draw_by_reference(filters, draws: int) -> torch.Tensor:
    """Tokens at positions 0..draws-1, with the noise of many positions computed at once."""
    one = [torch.tensor([ALPHA]), torch.tensor([TEMPERATURE])]
    x = reference.scaled(reference.combine(*row_of_logits(), one[0]), one[1])[0]
    kept = reference.kept_row(
        x, filters.get("top_k", 0), filters.get("top_p", 1.0), filters.get("min_p", 0.0)
    )
    x = torch.where(kept, x, -torch.inf)
    noise = reference.gumbel_noise(SEED, torch.arange(draws)[:, None], torch.arange(VOCAB))
    return (x + noise).argmax(1)


def draw_by_kernel(filters, draws: int, device, first: int = 0) -> torch.Tensor:
    logits = [member.to(device).expand(draws, VOCAB) for member in row_of_logits()]
    return proxy_sample(
        *logits,
        torch.tensor([ALPHA], device=device),
        torch.tensor([TEMPERATURE], device=device),
        torch.tensor([SEED], device=device),
        torch.arange(first, first + draws, device=device),
        row_to_request=torch.zeros(draws, dtype=torch.int32, device=device),
        **{name: tensor.to(device) for name, tensor in parameters(filters).items()},
    ).cpu()


def assert_fits(tokens: torch.Tensor, probabilities: torch.Tensor) -> None:
    """Chi-squared, bins of fewer than 5 expected draws pooled; nothing outside the support."""
    counts = torch.bincount(tokens, minlength=len(probabilities)).double()
    assert counts[probabilities == 0].sum() == 0
    counts, wanted = counts[probabilities > 0], probabilities[probabilities > 0] * len(tokens)
    rare = wanted < 5
    if rare.any():
        counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
        wanted = torch.cat([wanted[~rare], wanted[rare].sum()[None]])
        counts, wanted = counts[wanted >= 5], wanted[wanted >= 5]
        wanted *= counts.sum() / wanted.sum()
    assert stats.chisquare(counts.numpy(), wanted.numpy()).pvalue > 1e-3


@pytest.mark.parametrize("name", MIXTURES)
def test_frequencies(device, name):
    filters = MIXTURES[name]
    draws = draw_by_reference(filters, 120_000)
    assert_fits(draws, expected(filters))
    number = 120_000 if device.type == "cuda" else 100
    assert torch.equal(draw_by_kernel(filters, number, device), draws[:number])


def test_the_test_notices_a_wrong_distribution():
    draws = draw_by_reference({}, 120_000)
    with pytest.raises(AssertionError):
        assert_fits(draws, expected({"top_p": 0.8}))
    other = torch.softmax(row_of_logits()[0][0].double(), 0)
    with pytest.raises(AssertionError):
        assert_fits(draws, other)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "min-p, top-k, top-p"])
def test_frequencies_of_the_kernels_alone(device, name):
    filters = MIXTURES[name]
    number = 100_000 if name == "plain" else 10_000
    draws = [draw_by_kernel(filters, 5000, device, first) for first in range(0, number, 5000)]
    assert_fits(torch.cat(draws), expected(filters))


@pytest.mark.gpu
@pytest.mark.parametrize("name", MIXTURES)
def test_ten_million_draws(device, name):
    filters = MIXTURES[name]
    chunk = 500_000
    draws = [draw_by_kernel(filters, chunk, device, i * chunk) for i in range(20)]
    assert_fits(torch.cat(draws), expected(filters))
