"""Which members a method needs, its defaults, and thresholds of requests."""

import math

import pytest
from vllm import SamplingParams

from proxy_vllm.config import ProxyConfig
from proxy_vllm.errors import UserError
from proxy_vllm.methods import method_fields

PAIR = {"expert": "small", "antiexpert": "untuned"}


def config(method: str = "proxy", **given) -> ProxyConfig:
    return ProxyConfig(**method_fields(method, given.get("expert"), given.get("antiexpert")))


def test_defaults_and_members_that_are_the_base():
    assert config(**PAIR).alpha == 1 and config(**PAIR).beta == 0
    contrastive = config("contrastive", antiexpert="amateur").with_base("large")
    assert (contrastive.expert, contrastive.antiexpert) == ("large", "amateur")
    assert (contrastive.alpha, contrastive.beta) == (0.5, 0.1)
    assert contrastive.same_weights == {"expert": "base"} and not contrastive.runs("expert")
    dera = config("dera", expert="aligned").with_base("large")
    assert dera.same_weights == {"antiexpert": "base"} and dera.drafter == "expert"
    assert ProxyConfig.from_dict(dera.to_dict()) == dera
    own = method_fields("contrastive", None, "amateur", 2, 0)
    assert (own["alpha"], own["beta"]) == (2, 0)


@pytest.mark.parametrize(
    "method, given, words",
    [
        ("contrastive", PAIR, "--method contrastive: the expert is the base itself"),
        ("contrastive", {}, "antiexpert: a model folder or hub name is needed"),
        ("dera", PAIR, "--method dera: the antiexpert is the base itself"),
        ("dera", {}, "--method dera needs it"),
        ("proxy", {"expert": "small"}, "antiexpert: a model folder or hub name is needed"),
        ("beam", PAIR, "--method beam: there are proxy, dexperts"),
    ],
)
def test_wrong_members(method, given, words):
    with pytest.raises(UserError) as refused:
        config(method, **given)
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_arguments_of_a_member_that_is_the_base():
    fields = method_fields("contrastive", None, "amateur")
    with pytest.raises(UserError, match="--expert-args: with --method contrastive"):
        ProxyConfig(**fields, expert_args={"dtype": "float32"})


@pytest.mark.parametrize("value", [-0.1, 1.5, "much", True, math.nan, [0.1]])
def test_a_beta_that_cannot_be(value):
    with pytest.raises(UserError, match="a number from 0"):
        config(**PAIR).check_request(SamplingParams(extra_args={"proxy_beta": value}))
    # A worker must not raise.
    params = SamplingParams(extra_args={"proxy_beta": value})
    assert config(**PAIR).plausibility_of(params) == (-math.inf, math.inf)


def test_plausibility_of_requests():
    server = config("contrastive", antiexpert="amateur")
    assert server.plausibility_of(None) == (math.log(0.1), math.inf)
    own = SamplingParams(extra_args={"proxy_beta": "0.25"})
    assert server.plausibility_of(own) == (math.log(0.25), math.inf)
    off = SamplingParams(extra_args={"proxy_beta": 0})
    assert server.plausibility_of(off)[0] == -math.inf
    for narrow in ({"allowed_token_ids": [3]}, {"min_tokens": 2}):
        assert 1000 < server.plausibility_of(SamplingParams(**narrow))[1] < math.inf
