"""Sharded sampling on gloo ranks equals the unsharded kernels, with the traffic it promises."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from kernel_cases import make_case, make_filters, make_heads, on

from proxy_vllm.kernels.columns import Columns
from proxy_vllm.kernels.fused_head import fused_head_sample
from proxy_vllm.kernels.sharded import (
    Exchange,
    ShardedSampler,
    changes_rank,
    merge_shards,
    realign_columns,
)

ROWS, VOCAB = 5, 333
KINDS = ["", "m", "k", "p", "kpm", "b", "kpmb"]
CASE = {"rows": ROWS, "vocab": VOCAB, "extra": (17, -9), "greedy_every": 4}
# Uneven on purpose; with 4 ranks one shard is a single column and the last is empty.
BOUNDS = {
    "2": [(0, 100), (100, VOCAB)],
    "4": [(0, 150), (150, 151), (151, VOCAB), (VOCAB, VOCAB)],
}
REAL_WIDTHS = (151936, 152064)
HEADS = (VOCAB, VOCAB + 17, VOCAB - 9)
NAMED = VOCAB - 4  # of the named tokens the antiexpert lacks the last five
WORKER = Path(__file__).with_name("sharded_worker.py")


@pytest.fixture(scope="module", params=[2, 4], ids=["2 ranks", "4 ranks"])
def ranks(request, tmp_path_factory):
    """What every rank reports; the small members start on boundaries of their own."""
    world = request.param
    folder = tmp_path_factory.mktemp(f"ranks{world}")
    job = {
        "case": CASE,
        "bounds": BOUNDS,
        "kinds": KINDS,
        "heads": HEADS,
        "named": NAMED,
        "real_widths": REAL_WIDTHS,
    }
    torch.save(job, folder / "job.pt")
    processes = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), str(world), str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(world)
    ]
    try:
        logs = [process.communicate(timeout=500)[0].decode() for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), "\n".join(logs)[-4000:]
    return world, [torch.load(folder / f"rank{rank}.pt") for rank in range(world)]


def test_tokens_equal_the_unsharded_ones(ranks, device):
    world, reports = ranks
    case = make_case(**CASE).to(device)
    for index, kinds in enumerate(KINDS):
        filters = on(device, make_filters(ROWS, kinds=kinds))
        want = case.draw(named=NAMED, **filters).cpu()
        for report in reports:
            assert torch.equal(report["results"][index][0], want), (world, kinds)


def test_traffic(ranks):
    """One (score, token) pair a row; with filters counts and masses besides, and never logits."""
    _, reports = ranks
    measured = {kinds: reports[0]["results"][i][1:] for i, kinds in enumerate(KINDS)}
    # The antiexpert lacks tokens: each call sends two log-sum-exps a row.
    pair, extremes, round_ = 16 + 8, 8, 144
    assert measured[""] == (2, ROWS * pair)
    assert measured["m"] == (3, ROWS * (pair + extremes))
    assert measured["k"] == (11, ROWS * (pair + extremes + 8 * round_))
    assert measured["p"] == (11, ROWS * (pair + extremes + 8 * round_))
    assert measured["kpm"] == (19, ROWS * (pair + extremes + 16 * round_))
    assert measured["b"] == (3, ROWS * (pair + 4))
    assert reports[0]["logprob_traffic"] == (3, ROWS * 8 * (12 + 1 + 1))


def test_logprobs_equal_those_of_the_whole_vocabulary(ranks):
    _, reports = ranks
    case = make_case(**CASE)
    logits = case.combined(NAMED)
    tokens = reports[0]["results"][0][0]
    logprobs = torch.log_softmax(logits, dim=1)
    values, ids = logprobs.sort(dim=1, descending=True, stable=True)
    own = logprobs.gather(1, tokens[:, None])
    for report in reports:
        got_ids, got, got_ranks = report["logprobs"]
        assert torch.equal(got_ids, torch.cat([tokens[:, None], ids[:, :5]], dim=1))
        want = torch.cat([own, values[:, :5]], dim=1)
        torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-6)
        assert torch.equal(got_ranks, (logprobs > own).sum(dim=1))


def test_realigning_moves_only_the_columns_that_change_rank(ranks):
    world, reports = ranks
    # Expert 350 and antiexpert 324 columns, in shards of 176 or 96; the base's are in BOUNDS.
    columns_sent = {
        # Rank 0 sends 100..176 of both.
        2: [76 + 76, 0],
        # Rank 1 sends 96..150 and 151..192 of both, rank 3 288..333 and 288..324.
        4: [0, 95 + 95, 0, 45 + 36],
    }[world]
    assert [r["realign"] for r in reports] == [(2, ROWS * 4 * columns) for columns in columns_sent]


def test_realigning_real_vocabularies(ranks):
    world, reports = ranks
    width = REAL_WIDTHS[0] // world
    for rank, report in enumerate(reports):
        wanted, moved, calls, _ = report["real_widths"]
        assert wanted == (rank * width, (rank + 1) * width)
        assert torch.equal(moved, torch.arange(*wanted).float().expand(2, -1))
        assert calls == 1
    # Two rows of float32; rank r of the wider one starts r * 128 / world columns later.
    sent = sum(report["real_widths"][3] for report in reports)
    assert sent == 2 * 4 * sum(r * 128 // world for r in range(1, world))


def test_head_weights_over_ranks(ranks, device):
    """Each rank reads its rows of the three heads; the kernels refuse a rank without any."""
    world, reports = ranks
    if world != 2:
        assert reports[0]["heads"][0] is None
        return
    case = make_case(**CASE).to(device)
    hidden, weights = ([t.to(device) for t in ts] for ts in make_heads(ROWS, HEADS, torch.float32))
    columns = Columns.of(*(w.T for w in weights), HEADS[2])
    want, _ = fused_head_sample(hidden, weights, case.rows(), columns=columns)
    for tokens, calls, sent in (report["heads"] for report in reports):
        assert torch.equal(tokens, want.cpu())
        assert (calls, sent) == (1, ROWS * 16)


def test_columns_that_change_rank():
    base = [(0, 64), (64, 111)]
    assert not changes_rank([(0, 64), (64, 100)], base)  # a shorter vocabulary
    assert not changes_rank([(0, 64), (64, 128)], base)
    assert changes_rank([(0, 128), (128, 200)], base)
    assert changes_rank([(0, 60), (60, 111)], base)


def test_one_rank_needs_no_process_group(device):
    case = make_case(**CASE).to(device)
    sampler = ShardedSampler(Exchange())
    filters = on(device, make_filters(ROWS))
    tokens = sampler.sample(*case.logits, case.rows(**filters), columns=Columns.of(*case.logits))
    assert torch.equal(tokens, case.draw(**filters))
    whole = realign_columns(case.base, [(0, VOCAB)], [(0, VOCAB)], Exchange())
    assert torch.equal(whole, case.base)


def test_merge_takes_the_lowest_of_equals():
    scores = torch.tensor([[1.0, 5.0, -torch.inf], [1.0, 2.0, -torch.inf]])
    tokens = torch.tensor([[40, 1, 0], [7, 2, 100]])
    assert merge_shards(scores, tokens).tolist() == [7, 1, 0]


@pytest.mark.parametrize(("name", "value"), [("start", -1), ("total", 0), ("total", 1 << 19)])
def test_bad_bounds_are_named(name, value):
    case = make_case(**CASE)
    columns = replace(Columns.of(*case.logits), **{name: value})
    with pytest.raises(ValueError, match="columns"):
        ShardedSampler(Exchange()).sample(*case.logits, case.rows(), columns=columns)
