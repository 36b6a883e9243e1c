"""Parameters and caches that a plan counts are those of the models that vLLM builds."""

import json
import math
from collections import Counter

import pytest
import torch

from proxy_vllm.plan import decoder

# One of each kind: windows, latents, states, mixtures, fused and shared projections.
KINDS = {
    "ernie4_5_moe": {},
    "falcon": {},
    "gemma3_text": {},
    "deepseek_v3": {},
    "minicpm3": {},
    "granitemoehybrid": {"layer_types": [*["linear_attention"] * 31, "full_attention"]},
    "falcon_h1": {},
    "jamba": {},
    "qwen3_next": {},
    "zamba2": {},
}


@pytest.fixture
def one_rank(tmp_path):
    from vllm.distributed import (
        cleanup_dist_env_and_memory,
        init_distributed_environment,
        initialize_model_parallel,
    )

    def start():
        init_distributed_environment(1, 0, f"file://{tmp_path / 'store'}", 0, "gloo")
        initialize_model_parallel(1, 1)

    yield start
    cleanup_dist_env_and_memory()


def vllm_side(folder, start):
    """Parameters of vLLM's model, and what each of its layers keeps: elements and window."""
    from vllm import EngineArgs
    from vllm.config import set_current_vllm_config
    from vllm.config.vllm import get_layers_from_vllm_config
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.v1.kv_cache_interface import MambaSpec

    args = {"skip_tokenizer_init": True, "load_format": "dummy", "enforce_eager": True}
    args |= {"dtype": "bfloat16", "max_model_len": 256, "kv_cache_memory_bytes": 1 << 28}
    config = EngineArgs(model=str(folder), **args).create_engine_config()
    with set_current_vllm_config(config):
        start()
        with torch.device("meta"):
            model = initialize_model(config)
        layers = get_layers_from_vllm_config(config, AttentionLayerBase).values()
        specs = [spec for layer in layers if (spec := layer.get_kv_cache_spec(config))]
    kept: Counter = Counter()
    for spec in specs:
        if isinstance(spec, MambaSpec):  # on a CPU vLLM keeps states in float32: elements, no bytes
            kept["state", sum(math.prod(shape) for shape in spec.shapes), None] += 1
        else:
            row = spec.unpadded_page_size_bytes // spec.block_size // 2
            kept["token", row, getattr(spec, "sliding_window", None)] += 1
    return sum(p.numel() for p in model.parameters()), kept


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_counts_are_those_of_vllm(tmp_path, one_rank, kind):
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = decoder.text_config(kind, {"model_type": kind, **KINDS[kind]})
    model = decoder.build(kind, config)
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]]
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == kind
    params, kept = vllm_side(tmp_path, one_rank)
    ours = decoder.parameters(model)
    counted = ours.layers + ours.head + ours.tables + ours.vectors + ours.routed
    assert counted == pytest.approx(params, rel=1e-3)
    caches: Counter = Counter()
    for cache in decoder.caches(kind, config, model):
        if not cache.width:
            caches["state", cache.conv_elements + cache.state_elements, None] += 1
        elif cache.owned:
            caches["token", cache.heads * cache.width, cache.window] += 1
    assert caches == kept
