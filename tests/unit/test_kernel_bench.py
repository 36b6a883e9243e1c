"""What bench_kernels.py concludes from its rows; these are made up."""

from kernel_bench.report import decisions


def row(provider: str, batch: int, kind: str, p50: float, eager: float = 0.0, **more) -> dict:
    source = "heads" if provider in ("heads+proxy", "fused_head") else "logits"
    cell = {"source": source, "vocab": 128256, "dtype": "bfloat16", "logits": "peaked"}
    times = {"p50_us": p50, "eager_us": eager, "share_of_copy": 0.5}
    return {**cell, "provider": provider, "batch": batch, "kind": kind, **times, **more}


def test_decisions():
    rows = [
        row("heads+proxy", 1, "greedy", 10.0, 30.0),
        row("heads+proxy", 1, "plain", 20.0, 30.0),
        row("fused_head", 1, "greedy", 5.0),
        row("fused_head", 1, "plain", 16.0),
        row("heads+proxy", 8, "greedy", 10.0, 10.0),
        row("heads+proxy", 8, "plain", 10.0, 10.0),
        row("fused_head", 8, "greedy", 5.0),
        row("fused_head", 8, "plain", 11.0),
        row("eager+vllm", 1, "plain", 30.0),
        row("proxy", 1, "plain", 6.0),
        row("eager+flashinfer", 1, "plain", 5.0),
        row("eager+flashinfer", 8, "plain", 5.0),
        # Another dtype and another vocabulary decide nothing, but count against FlashInfer.
        row("proxy", 1, "plain", 1.0, dtype="float32"),
        row("proxy", 8, "top-p", 9.0, vocab=32000),
        row("eager+flashinfer", 8, "top-p", 8.0, vocab=32000),
    ]
    got = decisions(rows)
    graphs = got["graph_speedup_of_heads_and_sampler"]
    assert graphs["greedy 1"] == 3 and graphs["plain 1"] == 1.5 and graphs["mixed 1"] is None
    assert got["fused_head_speedup"]["plain 1"] == 1.25
    assert got["fused_head_max_batch"] == 1  # at 8 it loses to stored logits for plain rows
    assert got["us_at_batch_1"] == 6
    assert got["share_of_copy"]["plain 1"] == 0.5
    assert got["speedup_over_eager_and_vllm"]["plain 1"] == 5
    slower = got["slower_than_flashinfer"]
    assert [(r["vocab"], r["batch"], r["ours_us"]) for r in slower] == [
        (128256, 1, 6.0),
        (32000, 8, 9.0),
    ]

    assert got["targets_met"] == {
        "80 % of copy bandwidth from batch 64": None,
        "under 10 us at batch 1": True,
        "3 times eager and vLLM, plain": True,
        "1.5 times eager and vLLM, top-k + top-p": None,
        "faster than FlashInfer in every cell": False,
    }


def test_a_target_holds_in_every_batch_or_not_at_all():
    rows = [
        row("proxy", 64, "plain", 10.0, share_of_copy=0.9),
        row("proxy", 256, "plain", 10.0, share_of_copy=0.79),
        row("eager+vllm", 64, "plain", 40.0),
        row("eager+vllm", 256, "plain", 29.0),
        row("proxy", 64, "top-k+top-p", 10.0),
        row("eager+vllm", 64, "top-k+top-p", 15.0),
    ]
    assert list(decisions(rows)["targets_met"].values()) == [False, None, False, True, None]


def test_no_rows_no_decisions():
    got = decisions([])
    assert set(got["targets_met"].values()) == {None}
    assert got["us_at_batch_1"] is None and got["fused_head_max_batch"] == 0
