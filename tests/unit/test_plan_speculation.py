"""What drafts gain by the plan, against hand counts and the figures of an independent model."""

import pytest
from test_roofline import LLAMA_3_1B, LLAMA_3_8B, SLOW, TINY, llama

from proxy_vllm.errors import UserError
from proxy_vllm.plan.gpus import Gpu
from proxy_vllm.plan.model_size import model_shape
from proxy_vllm.plan.roofline import plan, step_floor
from proxy_vllm.plan.speculation import expected_tokens

H100 = Gpu("h100", bandwidth_tbps=3.0, tflops=790.0, memory_gib=79.1, source="given")
LLAMA_3_70B = llama(8192, 80, 64, 8, 28672, 128256)


def test_expected_tokens_by_hand():
    assert expected_tokens(0.0, 4) == 1
    assert expected_tokens(1.0, 4) == 5
    assert expected_tokens(0.5, 2) == 1 + 0.5 + 0.25


def test_hand_computed_round():
    # TINY (see test_roofline): 276096 bytes of matrices, 7680 of cache at 3 rows of 10 tokens, 2000
    # of logits a token; a byte is a nanosecond, and no phase is bound by arithmetic here.
    # Two drafts: 2 * (276096 + 7680 + 3 * 2000). Verification of 3 tokens a row by three members:
    # 3 * (276096 + 7680 + 9 * 2000). Peer: the same drafts, and one member.
    result = plan(
        TINY, TINY, TINY, SLOW, batch=3, context=10, speculative_tokens=2, acceptance=0.5
    ).speculation
    draft, verify = 2 * 289_776e-6, 301_776e-6
    assert result.round_ms == pytest.approx(draft + 3 * verify)
    assert result.tokens_per_s == pytest.approx(3 * 1.75 / (draft + 3 * verify) * 1e3)
    assert result.peer_tokens_per_s == pytest.approx(3 * 1.75 / (draft + verify) * 1e3)


@pytest.mark.parametrize(
    "base, small, tp, batch, gain",  # floors of an H100, acceptance 0.7, best K of 1 to 8
    [
        (LLAMA_3_8B, LLAMA_3_1B, 1, 1, 1.37),
        (LLAMA_3_8B, LLAMA_3_1B, 1, 64, 1.23),
        (LLAMA_3_70B, LLAMA_3_8B, 4, 1, 1.68),
        (LLAMA_3_70B, LLAMA_3_8B, 4, 64, 1.42),
    ],
)
def test_gains_are_those_of_an_independent_model(base, small, tp, batch, gain):
    base, small = model_shape(base), model_shape(small)
    best = 0.0
    for k in (1, 2, 3, 4, 5, 6, 8):
        load = {"tp": tp, "batch": batch, "speculative_tokens": k, "acceptance": 0.7}
        result = plan(base, small, small, H100, **load)
        best = max(best, result.speculation.tokens_per_s / result.base_tokens_per_s)
        # Whoever pays for less is faster: the base with the same drafter.
        assert result.speculation.peer_tokens_per_s > result.speculation.tokens_per_s
    assert best == pytest.approx(gain, rel=0.05)


def test_verifying_reads_weights_once_and_caches_once():
    shape = model_shape(TINY)
    one = step_floor([shape], SLOW, batch=2, context=10)
    four = step_floor([shape], SLOW, batch=2, context=10, tokens_per_row=4)
    assert four.matmul_ms == one.matmul_ms
    assert four.attention_ms == one.attention_ms
    assert four.sampling_ms == pytest.approx(4 * one.sampling_ms)


@pytest.mark.parametrize(
    "fields, culprit",
    [
        ({"speculative_tokens": 0, "acceptance": 0.7}, "--speculative-tokens 0"),
        ({"speculative_tokens": 33, "acceptance": 0.7}, "--speculative-tokens 33"),
        ({"speculative_tokens": 4, "acceptance": 1.2}, "--acceptance 1.2"),
        ({"speculative_tokens": 4, "acceptance": float("nan")}, "--acceptance nan"),
        ({"speculative_tokens": 4}, "go together"),
        ({"acceptance": 0.7}, "go together"),
    ],
)
def test_bad_inputs_are_refused_by_name(fields, culprit):
    with pytest.raises(UserError, match=culprit):
        plan(TINY, TINY, TINY, "h200", **fields)
