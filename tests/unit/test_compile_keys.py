"""What vLLM's cache of compiled graphs takes a member's graph for."""

import pytest
from vllm import EngineArgs

from proxy_vllm.composite.member_configs import member_vllm_configs
from proxy_vllm.config import ProxyConfig
from proxy_vllm.engine_args import apply_to_engine_args
from proxy_vllm.plugin import register


@pytest.fixture
def keys(trio):
    """Configuration hashes of the three members of an engine, by role."""
    register()

    def keys(**settings) -> dict[str, str]:
        names = {role: settings.pop(role, trio[role]) for role in ("expert", "antiexpert")}
        proxy = ProxyConfig(**names, **settings)
        args = {"model": trio["model"], "dtype": "float32", "max_model_len": 256}
        config = EngineArgs(**apply_to_engine_args(args, proxy)).create_engine_config()
        members = member_vllm_configs(config, proxy)
        return {role: member.compute_hash() for role, member in members.items()}

    return keys


def test_roles_of_one_model_have_graphs_of_their_own(keys, trio):
    """Layer names are part of a graph: the antiexpert's must not write into the expert's cache."""
    same = keys(expert=trio["model"], antiexpert=trio["model"])
    assert len(set(same.values())) == 3


def test_graphs_are_kept_for_another_alpha_and_not_for_other_members(keys, trio):
    first = keys()
    assert keys(alpha=0.25, alpha_range=(-1, 1), allow_tokenizer_mismatch=True) == first
    # vLLM names one folder for an engine's graphs by the base's key.
    for other in (
        keys(expert=trio["antiexpert"]),
        keys(antiexpert=trio["model"]),
        keys(expert_args={"dtype": "bfloat16"}),
    ):
        assert not set(other.values()) & set(first.values())
