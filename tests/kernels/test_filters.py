"""The sets that top-k, top-p and min-p keep, read off the thresholds the kernels find."""

import pytest
import torch
from kernel_cases import Case, assert_tokens, make_case, make_filters, on

from proxy_vllm.kernels import reference
from proxy_vllm.kernels.thresholds import find_thresholds


def kept_by_kernel(case: Case, device, tile=None, **filters) -> tuple[torch.Tensor, torch.Tensor]:
    """(kept [B, V], scaled logits [B, V]) of the filtered rows of a case without greedy rows."""
    launch = case.to(device).launch(tile=tile, **on(device, filters))
    launch.combine()
    keys = launch.thresholds()[:, 0].cpu()
    bits = torch.where(keys < 0, keys ^ 0x7FFFFFFF, keys).to(torch.int32)
    threshold = bits.view(torch.float32)
    x = launch.x.cpu()
    return x >= threshold[:, None], x


def assert_kept(case: Case, kept: torch.Tensor, x: torch.Tensor, **filters) -> None:
    """`kept` is the reference's set on the same float32 logits, except on the edge of top-p."""
    rows, vocab = x.shape
    for row in range(rows):
        top_k = int(filters["top_k"][row]) if "top_k" in filters else 0
        top_p = float(filters["top_p"][row]) if "top_p" in filters else 1.0
        min_p = float(filters["min_p"][row]) if "min_p" in filters else 0.0
        if not 0 < top_k < vocab and top_p >= 1:
            continue  # not a row of these kernels
        exact = x[row].double()
        want = reference.kept_row(exact, top_k, top_p, min_p)
        differ = (want != kept[row]).nonzero().flatten()
        if len(differ) == 0:
            continue
        # Probability that lies above a token decides top-p; float32 exp cannot place it closer.
        base = reference.kept_row(exact, top_k, 1.0, min_p)
        weight = torch.where(base, torch.softmax(exact, 0), 0)
        for token in differ:
            above = weight[exact > exact[token]].sum() / weight.sum()
            assert abs(above - top_p) < 1e-6, (row, int(token), float(above), top_p)


KINDS = ["k", "p", "kp", "pm", "kpm"]


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize(("rows", "vocab"), [(1, 111), (5, 4099), (33, 111)])
def test_kept_sets(device, rows, vocab, kinds):
    case = make_case(rows, vocab, extra=(3, -2))
    filters = make_filters(rows, seed=rows, kinds=kinds)
    kept, x = kept_by_kernel(case, device, **filters)
    assert_kept(case, kept, x, **filters)


@pytest.mark.parametrize("kinds", ["k", "p", "kpm"])
def test_kept_sets_with_many_equal_logits(device, kinds):
    case = make_case(9, 4099, lattice=0.5, scale=1.5)
    filters = make_filters(9, kinds=kinds)
    kept, x = kept_by_kernel(case, device, **filters)
    assert_kept(case, kept, x, **filters)


def test_kept_set_at_32000(device):
    case = make_case(2, 32000, scale=1.0, dtype=torch.bfloat16)
    filters = {
        "top_k": torch.tensor([20_000, 0], dtype=torch.int32),
        "top_p": torch.tensor([0.9, 0.9]),
    }
    kept, x = kept_by_kernel(case, device, **filters)
    assert_kept(case, kept, x, **filters)
    assert kept.sum() > 10_000


def test_kept_sets_do_not_depend_on_tiles(device):
    case = make_case(5, 1111)
    filters = make_filters(5)
    sets = [kept_by_kernel(case, device, tile=tile, **filters)[0] for tile in (128, 512, 2048)]
    assert torch.equal(sets[0], sets[1])
    assert torch.equal(sets[0], sets[2])


EXTREMES = {
    "all equal": lambda g: torch.zeros(300),
    "two values": lambda g: torch.where(torch.arange(300) % 7 == 0, 2.0, 1.0),
    "one finite": lambda g: torch.where(torch.arange(300) == 41, -3.0, -torch.inf),
    "few finite": lambda g: torch.where(torch.arange(300) % 50 == 0, 1.0, -torch.inf),
    "none finite": lambda g: torch.full((300,), -torch.inf),
    "crowded at zero": lambda g: 10.0 ** -(torch.arange(300) % 38).float(),
    "both signs at zero": lambda g: torch.randn(300, generator=g) * 1e-30,
    "zeros of both signs": lambda g: torch.where(torch.arange(300) % 2 == 0, 0.0, -0.0),
    "whole range": lambda g: torch.linspace(-1, 1, 300) * 3.3e38,
    "one infinite": lambda g: torch.where(torch.arange(300) == 8, torch.inf, 1.0),
    "one far ahead": lambda g: torch.where(torch.arange(300) == 8, 80.0, torch.rand(300)),
    "neighbouring floats": lambda g: (
        torch.full((300,), 7.0).view(torch.int32) + torch.arange(300).int()
    ).view(torch.float32),
}


@pytest.mark.parametrize("rounds", [1, 5])
@pytest.mark.parametrize("stage", ["top_k", "top_p"])
def test_extreme_rows(device, stage, rounds):
    """Each stage alone, with few rounds (the finish does the search) and with many."""
    generator = torch.Generator().manual_seed(0)
    x = torch.stack([make(generator) for make in EXTREMES.values()])
    number = len(EXTREMES)
    top_k = torch.tensor([1, 7, 50, 299], dtype=torch.int32).repeat_interleave(number)
    top_p = torch.tensor([1e-6, 0.3, 0.9, 0.9999]).repeat_interleave(number)
    x = x.repeat(4, 1)
    rows = x.shape[0]
    tile_max = torch.stack([part.max(1).values for part in x.split(128, 1)], 1)
    finite = torch.where(x > -torch.inf, x, torch.inf)
    tile_min = torch.stack([part.min(1).values for part in finite.split(128, 1)], 1)
    filters = {stage: {"top_k": top_k, "top_p": top_p}[stage].to(device)}
    parameters = make_case(rows, 1).to(device).rows(**filters).complete()
    state = find_thresholds(
        x.to(device),
        stage,
        None,
        tile_max.contiguous().to(device),
        tile_min.contiguous().to(device),
        parameters,
        tile=128,
        num_pivots=8,
        num_rounds=rounds,
    )
    keys = state[:, 0].cpu()
    bits = torch.where(keys < 0, keys ^ 0x7FFFFFFF, keys).to(torch.int32)
    kept = x >= bits.view(torch.float32)[:, None]
    named = list(EXTREMES)
    for row in range(rows):
        want = reference.kept_row(
            x[row].double(),
            int(top_k[row]) if stage == "top_k" else 0,
            1.0 if stage == "top_k" else float(top_p[row]),
            0.0,
        )
        # A logit of -inf has no probability: that it is kept or not makes no difference.
        possible = x[row] > -torch.inf
        same = torch.equal(kept[row] & possible, want & possible)
        assert same, (named[row % number], int(top_k[row]), float(top_p[row]))


@pytest.mark.parametrize("kinds", KINDS)
def test_tokens(device, kinds):
    case = make_case(33, 700, greedy_every=6, extra=(-7, 2))
    filters = make_filters(33, kinds=kinds)
    tokens = case.to(device).draw(**on(device, filters))
    assert_tokens(tokens, case, **filters)


@pytest.mark.parametrize("off", [0, -1, 111, 5000])
def test_top_k_that_is_off(device, off):
    case = make_case(5, 111).to(device)
    top_k = torch.full((5,), off, dtype=torch.int32, device=device)
    top_p = torch.ones(5, device=device)
    got = case.draw(top_k=top_k, top_p=top_p)
    assert torch.equal(got, case.draw())


def test_top_k_of_one_and_tiny_top_p_are_greedy(device):
    case = make_case(5, 4099).to(device)
    greedy = make_case(5, 4099).to(device)
    greedy.temperature[:] = 0
    want = greedy.draw()
    one = torch.ones(5, dtype=torch.int32, device=device)
    assert torch.equal(case.draw(top_k=one), want)
    tiny = torch.full((5,), 1e-8, device=device)
    assert torch.equal(case.draw(top_p=tiny), want)
