"""Columns that no tokenizer names, and tokens that a small member lacks, in every kernel."""

from dataclasses import replace

import pytest
import torch
from kernel_cases import Case, assert_tokens, make_case, make_filters, make_heads, on

from proxy_vllm.kernels.columns import Columns
from proxy_vllm.kernels.combine_sample import proxy_combine
from proxy_vllm.kernels.fused_head import fused_head_sample
from proxy_vllm.kernels.sharded import Exchange, ShardedSampler

ROWS, VOCAB, NAMED = 12, 300, 271
KINDS = ["", "m", "k", "p", "kpm"]


def padded_case(missing: int = 0) -> Case:
    """Every third row has alpha 0. All padding of the base is far ahead of its tokens."""
    extra = (20, -VOCAB + NAMED - missing)
    case = make_case(ROWS, VOCAB, extra=extra, lattice=0.125, greedy_every=4)
    case.alpha[case.alpha == 0] = 0.5
    case.alpha[::3] = 0
    case.base[:, NAMED:] += 50
    return case


def draws(case: Case, filters: dict[str, torch.Tensor], device) -> list[torch.Tensor]:
    """Of the kernels as one device runs them, and of a shard."""
    case, filters = case.to(device), on(device, filters)
    columns = Columns.of(*case.logits, NAMED)
    sharded = ShardedSampler(Exchange()).sample(
        *case.logits, case.rows(**filters), columns=columns, tile=64
    )
    return [case.draw(named=NAMED, **filters).cpu(), sharded.cpu()]


@pytest.mark.parametrize("missing", [0, 30])
@pytest.mark.parametrize("kinds", KINDS)
def test_padding_is_never_drawn_unless_alpha_is_zero(device, kinds, missing):
    case, filters = padded_case(missing), make_filters(ROWS, kinds=kinds)
    for tokens in draws(case, filters, device):
        assert_tokens(tokens, case, named=NAMED, **filters)
        assert (tokens[case.alpha != 0] < NAMED).all()
        assert (tokens[case.alpha == 0] >= NAMED).all()


@pytest.mark.parametrize("missing", [0, 30])
@pytest.mark.parametrize("member", ["base", "expert", "antiexpert"])
@pytest.mark.parametrize("kinds", ["", "kpm"])
def test_a_constant_in_one_member_changes_no_token(device, kinds, member, missing):
    case, filters = padded_case(missing), make_filters(ROWS, kinds=kinds)
    before = draws(case, filters, device)
    constant = -32.0 if member == "expert" else 32.0
    moved = replace(case, **{member: getattr(case, member) + constant})
    for tokens, want in zip(draws(moved, filters, device), before):
        assert torch.equal(tokens, want)


@pytest.mark.parametrize("missing", [0, 30])
def test_the_whole_distribution(device, missing):
    case = padded_case(missing)
    there = case.to(device)
    columns = Columns.of(*case.logits, NAMED)
    got = proxy_combine(*there.logits, there.alpha, columns=columns).cpu()
    torch.testing.assert_close(got.double(), case.combined(NAMED), atol=5e-6, rtol=1e-6)
    assert torch.equal(got[case.alpha == 0], case.base[case.alpha == 0])


def test_fused_head(device):
    hidden, weights = make_heads(ROWS, (VOCAB, VOCAB + 20, NAMED + 7), torch.float32)
    weights[0][NAMED:] *= 30
    case = padded_case()
    columns = Columns.of(*(w.T for w in weights), NAMED)
    tokens, _ = fused_head_sample(
        [h.to(device) for h in hidden],
        [w.to(device) for w in weights],
        case.to(device).rows(),
        columns=columns,
    )
    logits = case.with_logits(*(h.double() @ w.double().T for h, w in zip(hidden, weights)))
    assert_tokens(tokens, logits, named=NAMED)
    assert (tokens.cpu()[case.alpha != 0] < NAMED).all()
    assert (tokens.cpu()[case.alpha == 0] >= NAMED).any()
