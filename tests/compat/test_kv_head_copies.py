"""Which models have ranks hold copies of a KV head in vLLM: `check_heads` refuses the others."""

import re
from contextlib import ExitStack
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from families import make_family
from vllm import EngineArgs
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers import linear
from vllm.model_executor.models import gpt_oss, llama, registry

from proxy_vllm.errors import UserError
from proxy_vllm.validate import check_heads

# A rank's number of KV heads, with nothing that makes it at least one.
DIVIDED = re.compile(r"self\.num_(?:local_)?(?:kv|key_value)_heads = \S+ // \(?(?:self\.)?tp_size")


def test_models_that_only_divide_are_those_that_are_refused():
    (root,) = find_spec("vllm").submodule_search_locations
    found = set()
    for module, _ in registry._TEXT_GENERATION_MODELS.values():
        path = Path(root, *(module.split(".")[1:] if "." in module else ["model_executor/models"]))
        files = path.rglob("*.py") if "." in module else [path / f"{module}.py"]
        found |= {module for file in files if DIVIDED.search(file.read_text())}
    # The last one has as many KV heads as heads.
    assert found == {"gpt_oss", "param2moe", "vllm.models.inkling", "hrm_text"}


@pytest.fixture
def of_two_ranks(tmp_path):
    """The attention of a family as one of two ranks builds it."""
    from vllm.distributed import (
        cleanup_dist_env_and_memory,
        init_distributed_environment,
        initialize_model_parallel,
    )

    def build(family: str, kv_heads: int) -> Any:
        folder = make_family(tmp_path / f"{family}-{kv_heads}", family, 1, small=kv_heads == 1)
        engine = EngineArgs(model=folder, dtype="float32").create_engine_config()
        config = engine.model_config.hf_config
        assert config.num_key_value_heads == kv_heads
        module = {"gpt_oss": gpt_oss, "llama": llama}[family]
        with set_current_vllm_config(engine), ExitStack() as pretended:
            init_distributed_environment(1, 0, f"file://{tmp_path / 'store'}", 0, "gloo")
            initialize_model_parallel(1, 1)
            for user in (module, linear):
                size = patch.object(user, "get_tensor_model_parallel_world_size", lambda: 2)
                pretended.enter_context(size)
            if family == "gpt_oss":
                return gpt_oss.OAIAttention(config, prefix="layers.0.attn").attn
            heads = (config.hidden_size, config.num_attention_heads, kv_heads)
            return llama.LlamaAttention(config, *heads, prefix="layers.0.attn").attn

    yield build
    cleanup_dist_env_and_memory()


@pytest.mark.parametrize(
    "family, kv_heads, runs",
    [("gpt_oss", 2, True), ("gpt_oss", 1, False), ("llama", 1, True)],
)
def test_what_is_refused_is_what_vllm_cannot_build(of_two_ranks, family, kv_heads, runs):
    check = partial(check_heads, "expert 'm'", 2, kv_heads, 2, family)
    if runs:
        check()
        assert of_two_ranks(family, kv_heads).num_kv_heads == 1
        return
    with pytest.raises(UserError, match=r"expert .m. has too few .* --tensor-parallel-size 1$"):
        check()
    with pytest.raises(ZeroDivisionError):
        of_two_ranks(family, kv_heads)
