"""proxy_combine against the reference and the identities of the formula."""

import pytest
import torch
from kernel_cases import make_case

from proxy_vllm.kernels import reference
from proxy_vllm.kernels.combine_sample import proxy_combine


@pytest.mark.parametrize(
    ("dtype", "atol"), [(torch.float32, 5e-6), (torch.bfloat16, 5e-6), (torch.float16, 5e-6)]
)
@pytest.mark.parametrize(("rows", "vocab"), [(1, 111), (5, 4099), (33, 111), (5, 32000)])
def test_close_to_float64(device, dtype, atol, rows, vocab):
    case = make_case(rows, vocab, dtype=dtype, extra=(7, -3)).to(device)
    got = proxy_combine(*case.logits, case.alpha)
    want = case.combined()
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.cpu().double(), want, atol=atol, rtol=1e-6)


def test_exact_on_a_lattice(device):
    """Multiples of 1/8 with alpha in halves need no rounding: every bit must agree."""
    case = make_case(5, 4099, lattice=0.125).to(device)
    got = proxy_combine(*case.logits, case.alpha)
    want = case.combined()
    assert torch.equal(got.cpu().double(), want)


def test_alpha_zero_is_the_base_even_beside_nan(device):
    case = make_case(5, 111).to(device)
    case.expert[:] = torch.nan
    case.antiexpert[:] = torch.inf
    case.base[0, 3] = -torch.inf
    alpha = torch.zeros(5, device=device)
    got = proxy_combine(case.base, case.expert, case.antiexpert, alpha)
    assert torch.equal(got, case.base)


def test_equal_expert_and_antiexpert_are_the_base(device):
    case = make_case(5, 4099, dtype=torch.bfloat16).to(device)
    got = proxy_combine(case.base, case.expert, case.expert, case.alpha)
    assert torch.equal(got, case.base.float())


def test_base_equal_to_antiexpert_is_the_expert(device):
    case = make_case(5, 4099, dtype=torch.bfloat16).to(device)
    alpha = torch.ones(5, device=device)
    got = proxy_combine(case.base, case.expert, case.base, alpha)
    torch.testing.assert_close(got, case.expert.float(), atol=1e-6, rtol=2**-23)


def test_infinities_and_nan(device):
    inf, nan = torch.inf, torch.nan
    base = torch.tensor([[-inf, 1.0, 2.0, 3.0, nan, 4.0, inf, 5.0]], device=device)
    expert = torch.tensor([[0.0, -inf, 0.0, -inf, 0.0, nan, 1.0, inf]], device=device)
    antiexpert = torch.tensor([[0.0, -inf, -inf, 0.0, 0.0, 0.0, 0.0, 0.0]], device=device)
    for alpha in (1.0, -1.0):
        given = torch.full((1,), alpha, device=device)
        got = proxy_combine(base, expert, antiexpert, given)[0].cpu()
        assert got[[0, 1, 2, 3, 6, 7]].tolist() == [-inf, -inf, -inf, -inf, inf, -inf]
        assert got[4:6].isnan().all()
        want = reference.combine(*(t.cpu() for t in (base, expert, antiexpert, given)))[0]
        assert torch.equal(got.double().nan_to_num(7.0), want.nan_to_num(7.0))


def test_strided_rows_and_out(device):
    case = make_case(5, 111).to(device)
    wide = torch.randn(5, 300, device=device)
    wide[:, 64:175] = case.base
    out = torch.full((5, 256), 7.0, device=device)
    got = proxy_combine(
        wide[:, 64:175], case.expert, case.antiexpert, case.alpha, out=out[:, 8:119]
    )
    want = proxy_combine(*case.logits, case.alpha)
    assert got.data_ptr() == out[:, 8:].data_ptr()
    assert torch.equal(got, want)
    assert (out[:, :8] == 7).all() and (out[:, 119:] == 7).all()


def test_in_place(device):
    case = make_case(5, 111).to(device)
    want = proxy_combine(*case.logits, case.alpha)
    got = proxy_combine(*case.logits, case.alpha, out=case.base)
    assert got is case.base
    assert torch.equal(got, want)
