"""What steps of the small model alone say about one pass over both members' rows."""

from types import SimpleNamespace

import pytest
from bench_one_pass import SHAPES, floors, gains
from bench_step import LLAMA

from proxy_vllm.plan.gpus import find_gpu

ARGS = SimpleNamespace(batch=[4], context=100, tokens=16, gpu="h200", dtype="bfloat16")


def test_gains_of_steps_whose_parts_are_known():
    """A step is 3 ms that both members share, and 0.5 + 0.1 B ms a layer; 'tiny' has two."""

    def step(layers: int, rows: int) -> float:
        return 3 + layers * (0.5 + 0.1 * rows)

    steps = {
        what: {rows: step(layers, rows) for rows in (4, 8)}
        for what, layers in (("whole", 2), ("one_layer", 1))
    }
    (row,) = gains("tiny", [steps] * 3, ARGS)
    assert row["at_least"]["gain_ms"]["p50"] == pytest.approx(2 * 0.5)
    assert row["at_most"]["gain_ms"]["p50"] == pytest.approx(2 * 0.5 + 3)
    assert row["at_least"]["one_over_two"]["p50"] == pytest.approx(2.6 / 3.6, abs=1e-4)
    del steps["whole"][8]
    assert "left_out" in gains("tiny", [steps], ARGS)[0]


def test_the_floor_is_one_read_of_the_small_weights():
    """Of Llama 3's 1B, 1,235,814,400 weights of 2 bytes at 4.3 TB/s, until rows outweigh them."""
    assert LLAMA["dtype"] == "bfloat16" and SHAPES["70b"]["num_hidden_layers"] == 80
    few = floors("8b", "1b", find_gpu("h200"), 8, 1024, "bfloat16")
    assert few["gain_ms"] == pytest.approx(2 * 1_235_814_400 / 4.3e12 * 1e3, abs=1e-3)
    assert few["gain"] == pytest.approx(few["gain_ms"] / few["two_passes_ms"], abs=1e-3)
    assert floors("8b", "1b", find_gpu("h200"), 256, 1024, "bfloat16")["gain_ms"] == 0
