"""The number of drafts that a cost and an acceptance call for, and how fast it is found."""

import random

import pytest

from proxy_vllm.spec_decode.draft_length import PROBE, DraftLength, StepTime


def best(accept: float, start: float, each: float, most: int = 4) -> int:
    def tokens(k: int) -> float:
        return sum(accept**j for j in range(k + 1))

    return max(range(most + 1), key=lambda k: tokens(k) / (start + each * k))


def run(accept, start, each, steps=600, batch=4, seed=0, length=None, noise=0.05):
    """Simulate steps; the last choices that were no probe."""
    rng = random.Random(seed)
    length = length or DraftLength(4, slope=0.15)
    chosen = []
    for _ in range(steps):
        k = length.choose(batch)
        for _ in range(batch if k else 0):
            accepted = 0
            while accepted < k and rng.random() < accept:
                accepted += 1
            length.observe_drafts(k, accepted)
        length.observe_step(batch, k, (start + each * k) * rng.uniform(1 - noise, 1 + noise))
        if length.steps % PROBE:
            chosen.append(k)
    return chosen[-50:], length


@pytest.mark.parametrize(
    "accept, start, each",
    [
        (0.95, 1.0, 0.05),
        (0.95, 1.0, 0.3),
        (0.7, 1.0, 0.1),
        (0.6, 1.0, 0.35),
        (0.3, 1.0, 0.5),
        (0.1, 1.0, 0.4),
        (0.0, 1.0, 0.02),
        (1.0, 1.0, 0.9),
    ],
)
def test_the_choice_is_nearly_the_best(accept, start, each):
    chosen, _ = run(accept, start, each)

    def speed(k: int) -> float:
        return sum(accept**j for j in range(k + 1)) / (start + each * k)

    want = speed(best(accept, start, each))
    assert sum(map(speed, chosen)) / len(chosen) > 0.95 * want


def test_drafts_stop_where_they_lose_and_come_back():
    """A large batch pays for each row, a small one does not; acceptance changes with requests."""
    chosen, length = run(0.5, 1.0, 0.6, batch=64)
    assert set(chosen) == {0}
    chosen, length = run(0.9, 1.0, 0.1, batch=1, length=length)
    assert min(chosen) >= 3
    chosen, _ = run(0.95, 1.0, 0.05, batch=64, length=length, steps=4000)
    assert min(chosen) >= 3, "probes did not see that drafts are cheap now"


def test_the_first_choice_drafts():
    assert DraftLength(4, slope=0.15).choose(1) == 4


def test_a_line_without_spread_has_the_expected_slope():
    time = StepTime()
    for _ in range(50):
        time.observe(2, 1.3)
    start, each = time.line(0.15)
    assert start == pytest.approx(1.0, rel=1e-6)
    assert each == pytest.approx(0.15, rel=1e-6)
    for drafts in (0, 4) * 60:
        time.observe(drafts, 1.0 + 0.5 * drafts)
    assert time.line(0.15)[1] == pytest.approx(0.5, rel=0.1)
