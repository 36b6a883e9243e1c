"""Precision of float32 arithmetic on float32 and bfloat16 logits against float64, as a table.

Total variation between softmax(combined) in float64 and as computed, its largest value over rows,
and the share of rows whose argmax differs. The last line is bfloat16 arithmetic, which the kernels
exist to avoid; it also shows that the measure would notice.
"""

import pytest
import torch
from kernel_cases import make_case

from proxy_vllm.kernels.combine_sample import proxy_combine

ROWS, VOCAB = 64, 32000
# dtype of the logits: largest total variation allowed.
TABLE = {torch.float32: 1e-6, torch.bfloat16: 1e-6}


def variation(logits: torch.Tensor, exact: torch.Tensor) -> float:
    difference = torch.softmax(logits.double(), 1) - torch.softmax(exact, 1)
    return float(difference.abs().sum(1).max() / 2)


@pytest.fixture(scope="module", params=list(TABLE), ids=lambda dtype: str(dtype)[6:])
def case(request):
    case = make_case(ROWS, VOCAB, dtype=request.param, scale=2.0)
    return case, case.combined()


def test_total_variation_and_argmax_flips(case, device):
    case, exact = case
    got = proxy_combine(*case.to(device).logits, case.alpha.to(device)).cpu()
    assert variation(got, exact) < TABLE[case.base.dtype]
    flipped = got.argmax(1) != exact.argmax(1)
    # A flip is rounding only where the two best are closer than float32 tells apart.
    for row in flipped.nonzero().flatten():
        best = exact[row].topk(2).values
        assert best[0] - best[1] < 1e-5
    assert flipped.float().mean() <= 1 / ROWS


def test_greedy_tokens(case, device):
    case, exact = case
    greedy = case.to(device)
    greedy.temperature = torch.zeros(ROWS, device=device)
    tokens = greedy.draw().cpu()
    reached = exact.gather(1, tokens[:, None])[:, 0]
    assert (exact.max(1).values - reached < 1e-5).all()


def test_bfloat16_arithmetic_would_be_noticed():
    case = make_case(ROWS, VOCAB, dtype=torch.bfloat16, scale=2.0)
    exact = case.combined()
    coarse = case.base + case.alpha.bfloat16()[:, None] * (case.expert - case.antiexpert)
    assert variation(coarse, exact) > 1e-3
    assert (coarse.argmax(1) != exact.argmax(1)).any()
