"""The plan's memory figures against what a vLLM engine allocates."""

import pytest
from engines import SMALL, running
from tiny_models import make_model

from proxy_vllm.plan.roofline import plan

GPT2 = {"arch": "gpt2", "tied": True}
OPT = {"arch": "opt", "tied": True}
GROUPED = {"arch": "qwen2", "hidden": 128, "heads": 4, "kv_heads": 2, "layers": 3}


@pytest.mark.parametrize(
    "base_args, small_args", [({"kv_heads": 1}, {}), (GROUPED, GPT2), (GPT2, OPT)]
)
def test_kv_bytes_per_token_are_what_the_engine_takes(tmp_path, base_args, small_args):
    trio = {
        "model": make_model(tmp_path / "base", seed=1, **base_args),
        "expert": make_model(tmp_path / "expert", seed=2, **{"layers": 1, **small_args}),
        "antiexpert": make_model(tmp_path / "antiexpert", seed=3, **{"layers": 1, **small_args}),
    }
    counted = plan(*trio.values(), "h200", dtype=SMALL["dtype"], context=64)
    with running(**trio) as llm:
        cache = llm.llm_engine.vllm_config.cache_config
        tokens = cache.num_gpu_blocks * cache.block_size
        page = counted.kv_bytes_per_token * cache.block_size
    # As many whole blocks as the bytes asked for hold, and not one more.
    assert tokens == SMALL["kv_cache_memory_bytes"] // page * cache.block_size
