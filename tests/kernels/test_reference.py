"""The reference itself, against PyTorch, vLLM and the published formula."""

import math

import pytest
import torch
from scipy import stats

from proxy_vllm.kernels import reference


def test_combine_is_the_formula_by_hand():
    base = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    expert = torch.tensor([[5.0, 1.0, 0.0, 9.0]])
    antiexpert = torch.tensor([[1.0, 2.0, 8.0, 5.0]])
    got = reference.combine(base, expert, antiexpert, torch.tensor([0.5]))
    assert got.tolist() == [[3.0, 1.5, -1.0, 6.0]]


def test_combine_cuts_extra_columns_and_shifts_a_missing_one_by_the_probabilities():
    base = torch.tensor([[1.0, 2.0, 3.0]])
    expert = torch.tensor([[2.0, 4.0, 6.0, 99.0]])
    antiexpert = torch.tensor([[1.0, 1.0]])
    got = reference.combine(base, expert, antiexpert, torch.tensor([1.0]))
    lse = math.log(math.e**2 + math.e**4) - math.log(math.e + math.e)
    torch.testing.assert_close(got, torch.tensor([[2.0, 5.0, 3.0 + lse]], dtype=torch.float64))
    # The paper's formula on log-probabilities, with the ratio 1 for the token.
    e, a = expert[:, :2].log_softmax(1), antiexpert.log_softmax(1)
    want = base + torch.nn.functional.pad(e - a, (0, 1))
    torch.testing.assert_close(got.softmax(1).float(), want.softmax(1))


def test_combine_leaves_padding_out_unless_alpha_is_zero():
    base = torch.tensor([[1.0, 2.0, 9.0, 8.0]] * 2)
    small = torch.zeros(2, 3)
    got = reference.combine(base, small, small, torch.tensor([1.0, 0.0]), named=2)
    assert got.tolist() == [[1.0, 2.0, -torch.inf, -torch.inf], [1.0, 2.0, 9.0, 8.0]]


@pytest.mark.parametrize("named", [None, 9])
@pytest.mark.parametrize("member", [0, 1, 2])
def test_a_constant_in_one_member_changes_no_probability(member, named):
    generator = torch.Generator().manual_seed(0)
    members = [torch.randn(3, n, generator=generator, dtype=torch.float64) for n in (11, 12, 7)]
    alpha = torch.tensor([1.0, -0.5, 2.0])
    want = reference.combine(*members, alpha, named).softmax(1)
    members[member] += 40
    torch.testing.assert_close(reference.combine(*members, alpha, named).softmax(1), want)


def test_combine_with_infinities_and_nan():
    inf, nan = torch.inf, torch.nan
    base = torch.tensor([[-inf, 1.0, 2.0, 3.0, nan, 4.0]])
    expert = torch.tensor([[inf, -inf, 0.0, -inf, 0.0, nan]])
    antiexpert = torch.tensor([[0.0, -inf, -inf, 0.0, 0.0, 0.0]])
    got = reference.combine(base, expert, antiexpert, torch.tensor([1.0]))[0]
    assert got[:4].tolist() == [-inf, -inf, -inf, -inf]
    assert got[4:].isnan().all()
    off = reference.combine(base, expert, antiexpert, torch.tensor([0.0]))[0]
    assert torch.equal(off.nan_to_num(7.0), base[0].double().nan_to_num(7.0))


@pytest.mark.parametrize("top_k", [0, 1, 7, 110, 111])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3, 0.02])
def test_kept_set_is_that_of_vllms_sort(top_k, top_p):
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p_pytorch

    x = torch.randn(5, 111, generator=torch.Generator().manual_seed(top_k), dtype=torch.float64)
    masked = apply_top_k_top_p_pytorch(
        x.clone(), torch.full((5,), top_k or 111), torch.full((5,), top_p, dtype=torch.float64)
    )
    for row in range(5):
        kept = reference.kept_row(x[row], top_k, top_p, 0.0)
        assert torch.equal(kept, masked[row] > -torch.inf)


def test_kept_set_of_min_p_is_a_share_of_the_largest_probability():
    x = torch.randn(111, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2
    probabilities = torch.softmax(x, 0)
    kept = reference.kept_row(x, 0, 1.0, 0.1)
    assert torch.equal(kept, probabilities >= 0.1 * probabilities.max())


def test_equal_logits_stay_together():
    x = torch.tensor([3.0, 1.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    assert reference.kept_row(x, 2, 1.0, 0.0).tolist() == [True, True, True, True, False]
    assert reference.kept_row(x, 0, 0.85, 0.0).tolist() == [True, True, True, True, False]
    assert reference.kept_row(x, 0, 0.5, 0.0).tolist() == [True, False, False, False, False]


def test_noise_is_vllms(device):
    """vLLM's kernel on logits of zero returns the token with the largest noise."""
    from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample

    generator = torch.Generator().manual_seed(3)
    seeds = torch.randint(-(2**63), 2**63 - 1, (6,), generator=generator)
    positions = torch.tensor([0, 1, 77, 4095, 2**31, 2**40])
    rows = torch.arange(6, dtype=torch.int32)
    tokens = gumbel_sample(
        torch.zeros(6, 4099, device=device),
        rows.to(device),
        torch.ones(6, device=device),
        seeds.to(device),
        positions.to(device),
        apply_temperature=True,
        is_drafting=False,
    )
    for row in range(6):
        noise = reference.gumbel_noise(int(seeds[row]), int(positions[row]), torch.arange(4099))
        assert int(tokens[row]) == int(noise.argmax())


def test_noise_follows_the_gumbel_distribution():
    noise = torch.cat([reference.gumbel_noise(seed, 5, torch.arange(50_000)) for seed in range(4)])
    assert stats.kstest(noise.numpy(), stats.gumbel_r.cdf).pvalue > 1e-3
