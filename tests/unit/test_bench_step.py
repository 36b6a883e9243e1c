"""What a measurement of steps says about the options that wait for one."""

import pytest
from bench_step import decisions


def row(batch: int, **medians: float) -> dict:
    """Step times of each system, five per cent around a median."""
    times = {
        system: {"step_ms": {"p20": 0.95 * ms, "p50": ms, "p80": 1.05 * ms}}
        for system, ms in medians.items()
    }
    return {"batch": batch, **times}


@pytest.mark.parametrize(
    ("faster", "said"),
    [
        ([0.8, 1.0, 1.0], "on: faster at batch [1], slower at none"),
        ([0.8, 0.8, 1.2], "off: faster at batch [1, 8], slower at [64]"),
        ([1.0, 1.02, 0.98], "off: faster at batch [], slower at []"),
    ],
)
def test_sampler_graphs(faster, said):
    rows = [row(b, proxy=5.0, sampler_graphs=5.0 * f) for b, f in zip((1, 8, 64), faster)]
    assert decisions(rows) == {"--sampler-cuda-graphs": said}


@pytest.mark.parametrize(
    ("faster", "most"),
    [
        ([0.8, 0.8, 0.8], "64:"),
        ([0.8, 0.8, 1.1], "8:"),
        ([0.8, 1.0, 0.8], "1:"),
        ([1, 0.5, 0.5], "0:"),
    ],
)
def test_fused_head(faster, most):
    rows = [row(b, proxy=5.0, fused_head=5.0 * f) for b, f in zip((1, 8, 64), faster)]
    assert decisions(rows)["--fused-head-max-batch"].startswith(most)


def test_nothing_is_said_of_what_was_not_measured():
    assert decisions([row(1, proxy=5.0, base=4.0)]) == {}
    left_out = {"batch": 256, "proxy": {"left_out": "x"}, "fused_head": {"left_out": "x"}}
    assert (
        "1:" in decisions([row(1, proxy=5.0, fused_head=3.0), left_out])["--fused-head-max-batch"]
    )
