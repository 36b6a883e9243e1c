"""Every provider of the registry draws the reference's tokens, or from its distribution."""

import pytest
import torch
from kernel_bench.launches import PROVIDERS, SamplerInputs, get_provider
from kernel_cases import Case, assert_tokens, make_case, make_filters, on

from proxy_vllm.kernels import reference


def inputs_of(case: Case, **filters) -> SamplerInputs:
    return SamplerInputs(case.rows(**filters), logits=case.logits)


@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize("name", [n for n, p in PROVIDERS.items() if p.source == "logits"])
def test_logit_providers(device, name, filtered):
    if PROVIDERS[name].missing():
        pytest.skip(f"{name}: {PROVIDERS[name].missing()}")
    provider = get_provider(name)
    case = make_case(5, 700, greedy_every=3 if provider.mixed else 0)
    filters = make_filters(5) if filtered else {}
    if filtered:
        filters["top_k"] = torch.where(filters["top_k"] > 0, filters["top_k"], 700)
    tokens = provider.draw(inputs_of(case.to(device), **on(device, filters)))
    if provider.same_noise:
        assert_tokens(tokens, case, **filters)
    else:
        scores = reference.scores(*case.logits, case.rows(**filters))
        assert (scores.gather(1, tokens.cpu()[:, None]) > -torch.inf).all()


@pytest.mark.parametrize("name", [n for n, p in PROVIDERS.items() if p.source == "heads"])
def test_head_providers(device, name):
    generator = torch.Generator().manual_seed(0)
    sizes = (64, 32, 48)
    hidden = [torch.randn(5, d, generator=generator) for d in sizes]
    weights = [torch.randn(300, d, generator=generator) / d**0.5 for d in sizes]
    case = make_case(5, 300, greedy_every=3)
    inputs = SamplerInputs(
        case.to(device).rows(),
        hidden=tuple(t.to(device) for t in hidden),
        weights=tuple(t.to(device) for t in weights),
    )
    logits = [reference.head_logits(h, w) for h, w in zip(hidden, weights)]
    assert_tokens(get_provider(name).draw(inputs), case.with_logits(*logits))


def test_unknown_and_missing_providers_are_named():
    with pytest.raises(ValueError, match=r"provider: 'nope' is not known: .*fused_head"):
        get_provider("nope")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="eager\\+flashinfer needs a CUDA GPU"):
            get_provider("eager+flashinfer")
