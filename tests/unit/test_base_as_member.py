"""When a small member is the base itself, from vLLM's configurations of the members."""

import os
from pathlib import Path

import pytest
from tiny_models import make_model

from proxy_vllm.checks.same_weights import with_same_weights
from proxy_vllm.config import ProxyConfig
from proxy_vllm.errors import UserError
from proxy_vllm.validate import member_configs


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[str, str, str]:
    """A base, a link to it, and its copy."""
    root = tmp_path_factory.mktemp("same")
    base = make_model(root / "base", seed=1)
    os.symlink(base, root / "link", target_is_directory=True)
    (root / "copy").mkdir()
    for file in Path(base).iterdir():
        os.link(file, root / "copy" / file.name)
    return base, str(root / "link"), str(root / "copy")


def found(base: str, expert: str, antiexpert: str, arguments: dict, **fields) -> ProxyConfig:
    proxy = ProxyConfig(expert=expert, antiexpert=antiexpert, **fields)
    return with_same_weights(proxy, member_configs({"model": base, **arguments}, proxy))


def test_by_resolved_path_and_options(folders):
    base, link, copy = folders
    plain = {"dtype": "float32"}
    assert found(base, link, copy, plain).same_weights == {"expert": "base"}
    assert found(base, copy, base, plain).same_weights == {"antiexpert": "base"}
    for other in (
        {"dtype": "bfloat16"},
        {"hf_overrides": {"rope_theta": 5000.0}},
        {"quantization": "fp8"},
    ):
        assert not found(base, link, copy, plain, expert_args=other).same_weights
    # A map gives the member's ids other numbers.
    moved = {"expert": {7: 8, 8: 7}}
    assert not found(base, link, copy, plain, tokenizer_map=moved).same_weights


def test_passes_and_drafts(folders):
    base, link, copy = folders
    proxy = found(base, link, copy, {}, speculative_tokens=2)
    assert [proxy.runs(role) for role in ("base", "expert", "antiexpert")] == [True, False, True]
    assert proxy.drafter == "antiexpert"
    assert found(base, link, copy, {}, own_prompts=True).runs("expert")
    with pytest.raises(UserError, match="drafts no faster"):
        found(base, link, base, {}, speculative_tokens=2)
