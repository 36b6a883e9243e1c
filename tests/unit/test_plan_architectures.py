"""Counts of every text architecture that Transformers and vLLM share, and of published mixtures."""

import pytest

from proxy_vllm.errors import UserError
from proxy_vllm.plan import decoder
from proxy_vllm.plan.model_size import model_shape
from proxy_vllm.plan.roofline import plan

QWEN3_30B_A3B = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
}
GRANITE_4_SMALL = {
    "model_type": "granitemoehybrid",
    "hidden_size": 4096,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 768,
    "shared_intermediate_size": 1536,
    "num_local_experts": 72,
    "num_experts_per_tok": 10,
    "layer_types": [*["mamba"] * 5, "attention", *["mamba"] * 4] * 4,
    "mamba_n_heads": 128,
    "mamba_d_head": 64,
    "mamba_d_state": 128,
    "mamba_n_groups": 1,
    "vocab_size": 100352,
    "tie_word_embeddings": True,
}
KIMI_K2 = {
    "model_type": "kimi_k2",
    "num_attention_heads": 64,
    "n_routed_experts": 384,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "vocab_size": 163840,
    "rope_scaling": {"type": "a kind that only vLLM knows"},
}
GLM_45_AIR = {"model_type": "glm4_moe", "head_dim": 128}  # the class's defaults are its other sizes
GPT_OSS_120B = {"model_type": "gpt_oss"}
GPT_OSS_20B = {"model_type": "gpt_oss", "num_hidden_layers": 24, "num_local_experts": 32}


@pytest.mark.parametrize(
    "config, total, active",  # billions, from model cards and papers
    [
        (GLM_45_AIR, 106, 12),
        ({"model_type": "ernie4_5_moe"}, 21, 3),
        ({"model_type": "deepseek_v3"}, 671, 37),
        (KIMI_K2, 1026, 32),
        (GPT_OSS_120B, 116.8, 5.1),
        (GPT_OSS_20B, 20.9, 3.6),
        (QWEN3_30B_A3B, 30.5, 3.3),
        (GRANITE_4_SMALL, 32, 9),
        ({"model_type": "qwen3_next"}, 80, 3),
        ({"model_type": "minimax_m2"}, 230, 10),
        ({"model_type": "llama4_text"}, 109, 17),
        ({"model_type": "kimi_linear"}, 48, 3),
        ({"model_type": "longcat_flash"}, 560, 31.3),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else None,
)
def test_mixtures_have_their_published_size(config, total, active):
    shape = model_shape(config)
    assert shape.num_params == pytest.approx(total * 1e9, rel=0.05)
    # Cards round active parameters, and some count the token table.
    met = [shape.step_matmul_flops(1) / 2]
    met.append(met[0] + shape.params.tables)
    assert min(abs(m / (active * 1e9) - 1) for m in met) < 0.2


# What the classes' own defaults leave out, as no checkpoint does.
NEEDED = {
    "deepseek_v2": {"num_experts_per_tok": 6},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "nemotron": {"num_key_value_heads": 8},
}
REFUSED = {
    # Tokens choose what they attend to, or caches are compressed: no rule of ours counts that.
    "deepseek_v32",
    "deepseek_v4",
    "glm_moe_dsa",
    "hy_v4",
    "inkling_text",
    # Layers run several times a step.
    "hrm_text",
    # Transformers cannot build these of their own defaults.
    "dbrx",
    "qwen4_exp",
    "qwen4_exp_text",
}


def shared_architectures():
    """Types whose causal language model in Transformers is a text model of vLLM's registry."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    from vllm.model_executor.models.registry import _TEXT_GENERATION_MODELS

    for kind, classes in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        names = {classes} if isinstance(classes, str) else set(classes)
        if names & _TEXT_GENERATION_MODELS.keys():
            yield kind


def test_every_architecture_is_counted_or_refused():
    refused, counted = set(), 0
    for kind in shared_architectures():
        config = {"model_type": kind, **NEEDED.get(kind, {})}
        try:
            shape = model_shape(config)
        except UserError:
            refused.add(kind)
            continue
        built = decoder.build(kind, decoder.text_config(kind, config))
        if kind != "longcat_flash":  # its class gives weights to experts that have none
            assert shape.num_params == built.num_parameters(), kind
        experts = any("expert" in name for name, _ in built.named_modules())
        assert bool(shape.params.routed) is experts, kind
        assert shape.params.routed == 0 or 1 <= shape.experts_per_token < shape.params.num_experts
        assert all(cache.width or cache.conv_elements for cache in shape.caches), kind
        counted += 1
    assert refused == REFUSED
    assert counted > 60


def test_ranks_without_a_kv_head_where_vllm_makes_no_copies():
    """As an engine is refused: gpt-oss has 64 heads and 8 for keys and values."""
    assert plan(GPT_OSS_120B, GPT_OSS_20B, GPT_OSS_20B, "h200", tp=8).fits
    with pytest.raises(UserError, match="use at most --tensor-parallel-size 8"):
        plan(GPT_OSS_120B, GPT_OSS_20B, GPT_OSS_20B, "h200", tp=16)
