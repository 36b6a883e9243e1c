"""The formula on a CPU, as it is and compiled, against its definition in kernels/reference.py."""

import pytest
import torch

from proxy_vllm.composite.formula import combine_logits
from proxy_vllm.kernels.columns import Columns
from proxy_vllm.kernels.reference import combine
from proxy_vllm.kernels.row_parameters import Plausibility

INF, NAN = float("inf"), float("nan")
ALPHA = torch.tensor([1.0, 0.0, -1.5, 10.0, 0.3])


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Dynamo stops compiling after eight kinds of input, and then runs the function as it is."""
    torch._dynamo.reset()


def members(rows: int, widths: tuple[int, int, int], dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rows + sum(widths))
    return [torch.randn(rows, width, generator=generator).to(dtype) for width in widths]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("widths", [(401, 401, 401), (401, 430, 409), (401, 300, 409)])
@pytest.mark.parametrize("named", [None, 390])
def test_finite_logits(named, widths, rows, dtype, compiled):
    base, expert, antiexpert = members(rows, widths, dtype)
    alpha = ALPHA[:rows]
    columns = Columns.of(base, expert, antiexpert, named)
    got = combine_logits(base, expert, antiexpert, alpha, columns, compiled=compiled)
    assert got.dtype == torch.float32 and got.shape == base.shape
    want = combine(base, expert, antiexpert, alpha, named)
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-5)
    still = alpha == 0
    assert torch.equal(got[still], base[still].float())
    assert torch.equal(combine_logits(base, expert, expert, alpha, compiled=compiled), base.float())


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("member", [0, 1, 2])
@pytest.mark.parametrize("widths", [(401, 401, 401), (401, 300, 409)])
def test_a_constant_in_one_member_changes_no_probability(widths, member, compiled):
    logits = members(5, widths, torch.float32)
    columns = Columns.of(*logits, 390)
    want = combine_logits(*logits, ALPHA, columns, compiled=compiled).softmax(1)
    logits[member] = logits[member] + 30
    got = combine_logits(*logits, ALPHA, columns, compiled=compiled).softmax(1)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("where", [0, 1, 2])
@pytest.mark.parametrize("value", [INF, -INF, NAN])
def test_logits_that_are_not_finite(value, where, compiled):
    logits = members(5, (401, 401, 401), torch.float32)
    # In each row another token, in one row a token of all three.
    logits[where][range(5), range(5)] = value
    for member in logits:
        member[4, 9] = value
    got = combine_logits(*logits, ALPHA, compiled=compiled)
    want = combine(*logits, ALPHA)
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("widths", [(401, 401, 401), (401, 300, 409)])
def test_implausible_tokens(widths, compiled):
    logits = members(5, widths, torch.float32)
    logits[1][2, logits[0][2, :300].argmax()] = -INF  # what is forbidden sets no threshold
    columns = Columns.of(*logits, 390)
    log_beta = torch.tensor([0.1, 0.1, 0.3, 0.0, 1.0]).log()
    given = Plausibility(log_beta, torch.tensor([INF, INF, INF, INF, 50.0]))
    got = combine_logits(*logits, ALPHA, columns, plausibility=given, compiled=compiled)
    want = combine(*logits, ALPHA, 390, log_beta=log_beta)
    torch.testing.assert_close(got[:4].double(), want[:4], rtol=1e-6, atol=1e-5)
    plain = combine_logits(*logits, ALPHA, columns, compiled=compiled)
    kept = want[4] > -INF
    torch.testing.assert_close(got[4], torch.where(kept, plain[4], plain[4] - 50))
    assert torch.equal(got[3], plain[3])


def test_inputs_are_left_as_they_were():
    logits = members(5, (401, 401, 401), torch.float32)
    copies = [member.clone() for member in logits]
    for compiled in (False, True):
        combine_logits(*logits, ALPHA, compiled=compiled)
        assert all(map(torch.equal, logits, copies))
