"""Bad arguments raise a ValueError that names the argument; good ones of every kind pass."""

import pytest
import torch
from kernel_cases import make_case, make_heads

from proxy_vllm.kernels import triton_functions
from proxy_vllm.kernels.combine_sample import proxy_combine, proxy_sample
from proxy_vllm.kernels.fused_head import fused_head_sample
from proxy_vllm.kernels.row_parameters import RowParameters

SAMPLE = {
    "base": [
        lambda t: t[0],
        lambda t: t.int(),
        lambda t: t.double(),
        lambda t: t[:, :0],
        lambda t: t.T.contiguous().T,
        lambda t: t[:, ::2],
        lambda t: None,
    ],
    "expert": [lambda t: t[:1], lambda t: t.long(), lambda t: t[:, :0], lambda t: t.to("meta")],
    "antiexpert": [lambda t: t[None], lambda t: t.bool(), lambda t: t.T.contiguous().T],
    "alpha": [
        lambda t: t.double(),
        lambda t: t[:1],
        lambda t: torch.cat([t, t]),
        lambda t: t[None],
        lambda t: t.to("meta"),
        lambda t: 0.5,
        lambda t: None,
        lambda t: t.repeat_interleave(2)[::2],
    ],
    "temperature": [lambda t: t.bfloat16(), lambda t: t[:2]],
    "seeds": [lambda t: t.int(), lambda t: t[:2], lambda t: t.to("meta")],
    "positions": [
        lambda t: t.int(),
        lambda t: t.float(),
        lambda t: t[:2],
        lambda t: torch.cat([t, t]),
    ],
    "top_k": [lambda t: torch.ones(3), lambda t: torch.ones(2, dtype=torch.int32)],
    "top_p": [lambda t: torch.ones(3, dtype=torch.int32), lambda t: torch.ones(1)],
    "min_p": [lambda t: torch.ones(3, 1), lambda t: torch.ones(3, dtype=torch.float64)],
}
CASES = [(name, i) for name, changes in SAMPLE.items() for i in range(len(changes))]
POSITIONAL = ("base", "expert", "antiexpert", "alpha", "temperature", "seeds", "positions")


@pytest.mark.parametrize(("name", "index"), CASES)
def test_proxy_sample_names_the_argument(device, name, index):
    case = make_case(3, 111).to(device)
    arguments = dict(zip(POSITIONAL, case.tensors()))
    changed = SAMPLE[name][index](arguments.get(name))
    if isinstance(changed, torch.Tensor) and changed.device.type == "cpu":
        changed = changed.to(device)
    arguments[name] = changed
    logits = [arguments.pop(member) for member in POSITIONAL[:3]]
    with pytest.raises(ValueError, match=rf"^{name}: "):
        proxy_sample(*logits, RowParameters(**arguments))


@pytest.mark.parametrize(("name", "index"), [(n, i) for n, i in CASES if n in POSITIONAL[:4]])
def test_proxy_combine_names_the_argument(device, name, index):
    case = make_case(3, 111).to(device)
    arguments = dict(zip(POSITIONAL[:4], case.tensors()))
    arguments[name] = SAMPLE[name][index](arguments[name])
    with pytest.raises(ValueError, match=rf"^{name}: "):
        proxy_combine(**arguments)


@pytest.mark.parametrize(
    "out",
    [
        torch.empty(3, 112),
        torch.empty(3, 111, dtype=torch.bfloat16),
        torch.empty(3, 111, device="meta"),
        torch.empty(111, 3).T,
    ],
)
def test_out_is_named(device, out):
    case = make_case(3, 111).to(device)
    out = (
        out
        if out.device.type == "meta"
        else torch.empty_strided(out.shape, out.stride(), dtype=out.dtype, device=device)
    )
    with pytest.raises(ValueError, match=r"^out: "):
        proxy_combine(*case.logits, case.alpha, out=out)


def test_a_vocabulary_too_large_for_exact_sums_is_named(device):
    wide = torch.empty(1, 1 << 19, device=device, dtype=torch.bfloat16)
    one = torch.ones(1, device=device)
    ids = torch.zeros(1, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match=r"^base: "):
        proxy_sample(wide, wide, wide, RowParameters(one, one, ids, ids))


def test_tensors_on_a_cpu_are_named_where_there_is_no_interpreter(monkeypatch):
    monkeypatch.setattr(triton_functions, "INTERPRETED", False)
    case = make_case(3, 111)
    with pytest.raises(ValueError, match=r"^base: is on cpu"):
        case.draw()
    with pytest.raises(ValueError, match=r"^base: is on cpu"):
        proxy_combine(*case.logits, case.alpha)
    hidden, weights = make_heads(3, (111, 111, 111), torch.float32)
    with pytest.raises(ValueError, match=r"^hidden: is on cpu"):
        fused_head_sample(hidden, weights, case.rows())


def test_negative_strides_cannot_even_be_made():
    """PyTorch refuses them itself, which is why no kernel needs to."""
    with pytest.raises(ValueError, match="negative"):
        torch.from_numpy(torch.zeros(3, 5).numpy()[:, ::-1])


def test_empty_batch(device):
    case = make_case(0, 111).to(device)
    assert proxy_combine(*case.logits, case.alpha).shape == (0, 111)
    tokens = case.draw()
    assert tokens.shape == (0,) and tokens.dtype == torch.int64


def test_one_column(device):
    case = make_case(2, 1).to(device)
    case.base = case.base.T.contiguous().T  # a single column may carry any stride
    assert case.draw().tolist() == [0, 0]


def test_the_fused_head_refuses_filters(device):
    case = make_case(3, 111).to(device)
    hidden, weights = make_heads(3, (111, 111, 111), torch.float32)
    rows = case.rows(min_p=torch.zeros(3, device=device))
    with pytest.raises(ValueError, match=r"^rows: "):
        fused_head_sample([h.to(device) for h in hidden], [w.to(device) for w in weights], rows)
