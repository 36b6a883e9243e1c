"""The fused head against the reference: three products in float64, then proxy sampling."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from kernel_cases import Case, assert_tokens, make_case, make_heads

from proxy_vllm.kernels import reference
from proxy_vllm.kernels.columns import Columns
from proxy_vllm.kernels.fused_head import fused_head_sample, head_weight, supports


def with_logits(case: Case, hidden, weights, caps=(0, 0, 0), scales=(1, 1, 1)) -> Case:
    """The case with the heads' float64 logits in place of its own."""
    logits = [reference.head_logits(*each) for each in zip(hidden, weights, caps, scales)]
    return case.with_logits(*logits)


def named_columns(weights) -> Columns:
    """Every token that all three heads have; others have no name."""
    return Columns.of(*(w.T for w in weights), min(w.shape[0] for w in weights))


def run(case: Case, hidden, weights, device, **options) -> torch.Tensor:
    hidden, weights = ([t.to(device) for t in ts] for ts in (hidden, weights))
    options.setdefault("columns", named_columns(weights))
    return fused_head_sample(hidden, weights, case.to(device).rows(), **options)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 5, 33])
@pytest.mark.parametrize("vocabs", [(111, 111, 111), (999, 1010, 990)])
def test_tokens_of_the_reference(device, rows, vocabs, dtype):
    hidden, weights = make_heads(rows, vocabs, dtype)
    case = make_case(rows, vocabs[0], greedy_every=3)
    tokens = run(case, hidden, weights, device)
    assert_tokens(tokens, with_logits(case, hidden, weights), named=min(vocabs))


def test_tied_heads_with_padding_between_rows(device):
    """A head that is a slice of a larger table, rows further apart than the hidden size."""
    hidden, weights = make_heads(5, (300, 300, 300), torch.float32)
    tables = [torch.full((400, w.shape[1] + 24), 1e9) for w in weights]
    for table, w in zip(tables, weights):
        table[50:350, 8 : 8 + w.shape[1]] = w
    views = [t.to(device)[50:350, 8 : 8 + w.shape[1]] for t, w in zip(tables, weights)]
    case = make_case(5, 300)
    want = run(case, hidden, weights, device)
    assert torch.equal(run(case, hidden, views, device), want)
    assert_tokens(want, with_logits(case, hidden, weights))


def test_soft_caps_and_scales(device):
    hidden, weights = make_heads(5, (300, 300, 300), torch.float32)
    case = make_case(5, 300)
    caps, scales = (3.0, 2.0, 1.5), (0.5, 2.0, 1.0)
    tokens = run(case, hidden, weights, device, soft_caps=caps, scales=scales)
    assert_tokens(tokens, with_logits(case, hidden, weights, caps, scales))


def test_equal_expert_and_antiexpert_are_the_base_exactly(device):
    hidden, weights = make_heads(5, (999, 999, 999), torch.bfloat16, sizes=(96, 40, 40))
    case = make_case(5, 999)
    same = run(case, [hidden[0], *hidden[1:2] * 2], [weights[0], *weights[1:2] * 2], device)
    case.alpha[:] = 0
    assert torch.equal(same, run(case, hidden, weights, device))


def test_alpha_zero_ignores_the_small_members(device):
    hidden, weights = make_heads(4, (300, 300, 300), torch.float32)
    case = make_case(4, 300)
    case.alpha[:2] = 0
    broken = [hidden[0], hidden[1].clone(), hidden[2]]
    broken[1][:2] = torch.nan
    assert torch.equal(run(case, broken, weights, device), run(case, hidden, weights, device))


def test_same_tokens_as_logits_in_memory(device):
    """The noise and the tie rule are those of proxy_sample."""
    hidden, weights = make_heads(33, (500, 500, 500), torch.float32)
    case = make_case(33, 500, greedy_every=5)
    logits = with_logits(case, hidden, weights)
    logits = case.with_logits(*(t.float() for t in logits.logits))
    unfused = logits.to(device).draw()
    assert torch.equal(run(case, hidden, weights, device), unfused)
    assert torch.equal(run(case, hidden, weights, device, block_v=32), unfused)


def test_shards_merge_to_the_whole(device):
    from proxy_vllm.kernels.sharded import merge_shards

    hidden, weights = make_heads(5, (500, 510, 480), torch.float32)
    case = make_case(5, 500)
    whole = run(case, hidden, weights, device)
    rows = case.to(device).rows()
    parts = []
    for start, end in ((0, 123), (123, 500)):
        shard = [w[start:end].to(device) for w in weights]
        hidden_there = [h.to(device) for h in hidden]
        columns = replace(named_columns(weights), start=start)
        parts.append(fused_head_sample(hidden_there, shard, rows, columns=columns))
    tokens = merge_shards(
        torch.stack([score for _, score in parts]), torch.stack([token for token, _ in parts])
    )
    assert torch.equal(tokens, whole)


def test_tokens_that_a_small_member_lacks_are_refused(device):
    hidden, weights = make_heads(3, (111, 111, 105), torch.float32)
    columns = Columns.of(*(w.T for w in weights))
    with pytest.raises(ValueError, match="lack 6 named tokens"):
        run(make_case(3, 111), hidden, weights, device, columns=columns)


def test_no_rows(device):
    hidden, weights = make_heads(0, (111, 111, 111), torch.float32)
    assert run(make_case(0, 111), hidden, weights, device).shape == (0,)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda h, w: (h[:2], w), "hidden"),
        (lambda h, w: (h, [w[0], w[1][:, :3], w[2]]), r"weights \(expert\)"),
        (lambda h, w: (h, [w[0].int(), w[1], w[2]]), r"weights \(base\)"),
        (lambda h, w: ([h[0], h[1], h[2][:1]], w), r"hidden \(antiexpert\)"),
        (lambda h, w: (h, [w[0][:0], w[1], w[2]]), "V = 0"),
        (lambda h, w: ([h[0].T.contiguous().T, h[1], h[2]], w), r"hidden \(base\).*stride"),
    ],
)
def test_bad_arguments_are_named(device, change, name):
    hidden, weights = make_heads(3, (111, 111, 111), torch.float32)
    case = make_case(3, 111)
    with pytest.raises(ValueError, match=name):
        run(case, *change(hidden, weights), device)


def test_one_sided_soft_cap_is_refused(device):
    hidden, weights = make_heads(3, (111, 111, 111), torch.float32)
    with pytest.raises(ValueError, match="soft_caps"):
        run(make_case(3, 111), hidden, weights, device, soft_caps=(None, 3.0, None))


def test_supports_plain_heads_only():
    from vllm.model_executor.layers.vocab_parallel_embedding import (
        ParallelLMHead,
        UnquantizedEmbeddingMethod,
    )

    def head(**attributes):
        module = ParallelLMHead.__new__(ParallelLMHead)
        torch.nn.Module.__init__(module)
        plain = {
            "quant_method": UnquantizedEmbeddingMethod(),
            "weight": torch.nn.Parameter(torch.zeros(8, 4)),
            "bias": None,
        }
        for name, value in {**plain, **attributes}.items():
            setattr(module, name, value)
        return module

    good = head()
    assert torch.equal(head_weight(good), good.weight)
    assert supports([good, good, good])
    assert not supports([good, good, good], soft_caps=(None, 30.0, None))
    assert supports([good, good, good], soft_caps=(None, 30.0, 20.0))
    for bad in (
        head(quant_method=SimpleNamespace()),
        head(bias=torch.nn.Parameter(torch.zeros(8))),
        torch.nn.Linear(4, 8),
    ):
        assert head_weight(bad) is None
        assert not supports([good, bad, good])
