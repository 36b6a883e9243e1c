"""What pairs of measurements say about a difference between two trees."""

import pytest
from bench_pairs import compared, summary


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ([10.0, 10.0, 10.0], [10.5, 10.4, 10.6], "more"),
        ([10.0, 20.0, 30.0], [9.0, 18.0, 27.0], "less"),
        ([10.0, 10.0, 10.0], [10.5, 9.9, 10.6], "no difference"),  # one pair the other way
        ([10.0, 10.0, 10.0], [10.1, 10.1, 10.1], "no difference"),  # seen by all, and little
        ([10.0], [20.0], "unknown: fewer than 3 pairs"),
    ],
)
def test_a_difference_is_one_that_every_pair_shows(old, new, said):
    assert compared(old, new)["new_takes"] == said


def test_batches_that_an_engine_left_out_are_left_out():
    engine = {"start_s": 1.0, "peak_mib": 2.0, "kv_tokens": 3, "step_ms": {"1": 4.0}}
    pairs = [{"old": engine, "new": {**engine, "step_ms": {"1": 5.0, "8": 6.0}}}] * 3
    found = summary(pairs, [1, 8])
    assert list(found) == ["start_s", "peak_mib", "kv_tokens", "step_ms at batch 1"]
    assert found["step_ms at batch 1"]["ratios"] == [1.25] * 3
    assert found["kv_tokens"]["new_takes"] == "no difference"
