"""What a row of top log-probabilities proves, against the distribution that it was cut from."""

import numpy as np
import pytest

from proxy_vllm.remote_base.bounds import BaseRow, SteeredRow

VOCAB = 200


def cut(logprobs: np.ndarray, k: int) -> BaseRow:
    ids = np.argsort(-logprobs)[:k]
    return BaseRow.of_top(ids, logprobs[ids])


def rows(seed: int, spread: float, shift_spread: float) -> tuple[np.ndarray, np.ndarray]:
    noise = np.random.default_rng(seed)
    logits = noise.normal(size=VOCAB) * spread
    return logits - np.log(np.exp(logits).sum()), noise.normal(size=VOCAB) * shift_spread


@pytest.mark.parametrize("k", [1, 5, 20, VOCAB])
@pytest.mark.parametrize("spread", [0.5, 3.0, 8.0])
def test_certified_is_right_and_mass_is_bounded(k, spread):
    certified = 0
    for seed in range(200):
        logprobs, shift = rows(seed, spread, 2.0)
        row = SteeredRow(cut(logprobs, k), shift)
        steered = logprobs + shift
        token, certain = row.greedy()
        if certain:
            assert token == steered.argmax()
            certified += 1
        else:
            # The true argmax is the best known token, or among those that may beat it.
            assert steered.argmax() in {token, *row.challengers().tolist()} or k == VOCAB
        for temperature in (0.5, 1.0, 2.0):
            probs = np.exp((steered - steered.max()) / temperature)
            probs /= probs.sum()
            known = np.isin(np.arange(VOCAB), row.base.ids)
            assert probs[~known].sum() <= row.cut_mass(temperature) + 1e-9
    if k == VOCAB:
        assert certified >= 195  # all but near ties


def test_more_tokens_tighten_the_bounds():
    logprobs, shift = rows(0, 3.0, 2.0)
    row = SteeredRow(cut(logprobs, 5), shift)
    asked = np.argsort(-row.outside)[:16]
    more = SteeredRow(row.base.with_known(asked, logprobs[asked]), shift)
    assert more.bound <= row.bound
    assert more.cut_mass() < row.cut_mass()
    known = np.isin(np.arange(VOCAB), more.base.ids)
    assert (logprobs[~known] <= more.bound).all()


def test_a_row_with_missing_names_is_bounded_by_what_is_left_alone():
    logprobs, shift = rows(3, 3.0, 0.5)
    ids = np.argsort(-logprobs)[1:6]  # the likeliest is missing
    row = SteeredRow(BaseRow(ids, logprobs[ids]), shift)
    assert row.bound >= logprobs.max()
    assert not row.greedy()[1]


def test_tokens_that_are_kept_out_win_nothing():
    logprobs, shift = rows(4, 1.0, 1.0)
    allowed = [7, 150]
    masked = np.full(VOCAB, -np.inf)
    masked[allowed] = shift[allowed]
    row = SteeredRow(cut(logprobs, 5), masked)
    assert set(row.challengers().tolist()) <= set(allowed)
    asked = row.challengers()
    row = SteeredRow(row.base.with_known(asked, logprobs[asked]), masked)
    token, certain = row.greedy()
    assert certain and token == max(allowed, key=lambda t: logprobs[t] + shift[t])
    assert row.cut_mass() == 0


def test_equal_scores_are_not_certified():
    logprobs = np.log(np.array([0.4, 0.4, 0.2]))
    row = SteeredRow(cut(logprobs, 3), np.zeros(3))
    assert row.greedy() == (0, False)
