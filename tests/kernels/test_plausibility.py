"""Tokens that the base finds implausible are never drawn; and the formulas of other papers."""

import pytest
import torch
from kernel_cases import assert_tokens, make_case, make_filters, make_heads, on

from proxy_vllm.kernels import reference
from proxy_vllm.kernels.columns import Columns
from proxy_vllm.kernels.combine_sample import proxy_combine
from proxy_vllm.kernels.fused_head import fused_head_sample

INF, NAN = float("inf"), float("nan")
ONE = torch.ones(1, dtype=torch.float64)


def rows_of_logits(count: int, rows: int = 4, vocab: int = 37) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    return [torch.randn(rows, vocab, generator=generator).double() * 2 for _ in range(count)]


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0, 2.5])
def test_each_method_is_its_papers_formula(strength):
    """`combine` with other members in the places of expert and antiexpert (docs/methods.md)."""
    base, expert, antiexpert = rows_of_logits(3)
    alpha = torch.full((4,), strength, dtype=torch.float64)
    methods = reference.METHODS
    cases = {
        "proxy": ((base, expert, antiexpert), alpha, (base, expert, antiexpert, strength)),
        "dexperts": ((base, expert, antiexpert), alpha, (base, expert, antiexpert, strength)),
        "contrastive": ((base, base, antiexpert), alpha, (base, antiexpert, strength)),
        "dera": ((base, expert, base), alpha, (base, expert, strength)),
        # A guidance scale of 1 is the conditional alone.
        "cfg": ((base, base, antiexpert), alpha, (base, antiexpert, strength + 1)),
    }
    assert cases.keys() == methods.keys()
    for name, (members, weights, arguments) in cases.items():
        got = reference.combine(*members, weights).softmax(1)
        torch.testing.assert_close(got, methods[name](*arguments), rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("beta", [0.0, 1e-3, 0.1, 0.5, 1.0])
def test_plausible_tokens_by_their_probabilities(beta):
    base, expert, antiexpert = rows_of_logits(3)
    log_beta = (ONE * beta).log().expand(4)
    alpha = torch.ones(4, dtype=torch.float64)
    logits = reference.combine(base, expert, antiexpert, alpha, log_beta=log_beta)
    p = base.softmax(1)
    assert torch.equal(logits > -INF, p >= beta * p.amax(1, keepdim=True) * (1 - 1e-12))
    plain = reference.combine(base, expert, antiexpert, alpha)
    assert torch.equal(logits[logits > -INF], plain[logits > -INF])
    off = reference.combine(base, expert, antiexpert, alpha * 0, log_beta=log_beta)
    assert torch.equal(off, base)  # alpha 0 is the base as it is


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("extra, named", [((0, 0), None), ((17, -9), 105), ((17, -9), 329)])
def test_combined_logits(dtype, extra, named, device):
    """With tokens that small members lack, padding, and what forbids or spoils the base's best."""
    case = make_case(5, 333, dtype=dtype, extra=extra).to(device)
    log_beta = make_filters(5, kinds="b")["log_beta"]
    log_beta[:4] = torch.tensor([0.3, 1.0, 0.05, 0.5]).log()
    best = case.base[:, :100].argmax(1)
    case.base[range(5), best] = 20.0
    case.expert[0, best[0]], case.antiexpert[1, best[1]] = -INF, INF
    case.expert[2, best[2]] = NAN
    case.base[3, 0] = NAN
    case.base[:, 330:] = 50.0  # padding where `named` says so
    columns = Columns.of(*case.logits, named)
    got = proxy_combine(*case.logits, case.alpha, columns=columns, log_beta=log_beta.to(device))
    members = [t.cpu() for t in (*case.logits, case.alpha)]
    want = reference.combine(*members, named, log_beta=log_beta)
    torch.testing.assert_close(got.cpu().double(), want, rtol=1e-5, atol=1e-4, equal_nan=True)
    assert ((got > -INF).sum(1) > 0).all() and (got[:, :named] == -INF).any()
    drop = torch.full((5,), 100.0, device=device)
    masked = log_beta.to(device)
    lowered = proxy_combine(*case.logits, case.alpha, columns=columns, log_beta=masked, drop=drop)
    plain = proxy_combine(*case.logits, case.alpha, columns=columns)
    torch.testing.assert_close(
        lowered, torch.where((got == -INF) & (plain > -INF), plain - 100, plain), equal_nan=True
    )


@pytest.mark.parametrize("kinds", ["b", "bm", "bk", "bkpm"])
@pytest.mark.parametrize("extra, named", [((0, 0), None), ((17, -9), 329)])
def test_tokens(kinds, extra, named, device):
    case = make_case(12, 333, extra=extra, greedy_every=4)
    filters = make_filters(12, kinds=kinds)
    case.alpha[3] = 0
    for tile in (64, None):
        tokens = case.to(device).draw(named=named, tile=tile, **on(device, filters))
        assert_tokens(tokens, case, named=named, **filters)
    # Rows without a threshold draw what they draw alone.
    off = filters["log_beta"] == -INF
    without = {name: value for name, value in filters.items() if name != "log_beta"}
    plain = case.to(device).draw(named=named, **on(device, without))
    assert off.any() and torch.equal(tokens[off], plain[off])
    assert not torch.equal(tokens, plain)


def test_the_fused_head_refuses_them(device):
    hidden, weights = make_heads(4, (64, 64, 64), torch.float32)
    case = make_case(4, 64).to(device)
    rows = case.rows(log_beta=torch.zeros(4, device=device))
    with pytest.raises(ValueError, match="log_beta"):
        fused_head_sample([h.to(device) for h in hidden], [w.to(device) for w in weights], rows)
