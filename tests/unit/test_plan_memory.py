"""What a plan says of KV caches, against vLLM's own pages, groups and capacity.

Specifications of the layers are written by hand from published configurations; vLLM's classes give
the bytes of their pages, and its own functions group them and say how many requests fit.
"""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from test_plan_architectures import GPT_OSS_20B, GPT_OSS_120B, GRANITE_4_SMALL
from test_roofline import LLAMA_3_1B, LLAMA_3_8B

from proxy_vllm.plan.gpus import Gpu
from proxy_vllm.plan.model_size import ElementBytes, model_shape
from proxy_vllm.plan.roofline import GIB, plan, step_floor

BYTES = ElementBytes(2, 2)
# A byte is a nanosecond, and arithmetic takes no time.
SLOW = Gpu("slow", bandwidth_tbps=1e-3, tflops=1e6, memory_gib=1.0, source="given")
BLOCK = 16
CONTEXT = 32768


def gemma3(layers, hidden, heads, kv_heads, head_dim, ffn, window, vocab):
    return {
        "model_type": "gemma3_text",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": ffn,
        "sliding_window": window,
        "layer_types": [
            "full_attention" if i % 6 == 5 else "sliding_attention" for i in range(layers)
        ],
        "vocab_size": vocab,
    }


GEMMA_3_27B = gemma3(62, 5376, 32, 16, 128, 21504, 1024, 262208)
GEMMA_3_1B = gemma3(26, 1152, 4, 1, 256, 6912, 512, 262144)
DEEPSEEK_V3 = {"model_type": "deepseek_v3"}
QWEN_35_27B = {
    "model_type": "qwen3_5_text",
    "hidden_size": 5120,
    "num_hidden_layers": 64,
    "num_attention_heads": 24,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "intermediate_size": 17408,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 48,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "mamba_ssm_dtype": "float32",
    "vocab_size": 248320,
    "tie_word_embeddings": False,
}


def full(heads, dim):
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    return FullAttentionSpec(
        block_size=BLOCK, num_kv_heads=heads, head_size=dim, dtype=torch.bfloat16
    )


def window(heads, dim, tokens):
    from vllm.v1.kv_cache_interface import SlidingWindowSpec

    return SlidingWindowSpec(
        block_size=BLOCK,
        num_kv_heads=heads,
        head_size=dim,
        dtype=torch.bfloat16,
        sliding_window=tokens,
    )


def latent():
    from vllm.v1.kv_cache_interface import MLAAttentionSpec

    return MLAAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=576, dtype=torch.bfloat16)


def state(*shapes, dtypes):
    from vllm.v1.kv_cache_interface import MambaSpec

    return MambaSpec(block_size=CONTEXT, shapes=shapes, dtypes=dtypes)


def gated_delta():  # 16 key heads, 48 value heads of 128, a convolution over queries, keys, values
    conv, recurrent = (3, 2 * 16 * 128 + 48 * 128), (48, 128, 128)
    return state(conv, recurrent, dtypes=(torch.bfloat16, torch.float32))


def mamba2():  # 128 heads of 64, states of 128, one group
    conv, recurrent = (3, 128 * 64 + 2 * 128), (128, 64, 128)
    return state(conv, recurrent, dtypes=(torch.bfloat16, torch.bfloat16))


def gemma_specs(layers, heads, dim, tokens):
    return [full(heads, dim) if i % 6 == 5 else window(heads, dim, tokens) for i in range(layers)]


def gpt_oss_specs(layers):
    return [full(8, 64) if i % 2 else window(8, 64, 128) for i in range(layers)]


SPECS = {
    "Llama 3.1 8B": (LLAMA_3_8B, lambda: [full(8, 128)] * 32),
    "Gemma 3 27B": (GEMMA_3_27B, lambda: gemma_specs(62, 16, 128, 1024)),
    "Gemma 3 1B": (GEMMA_3_1B, lambda: gemma_specs(26, 1, 256, 512)),
    "gpt-oss-120b": (GPT_OSS_120B, lambda: gpt_oss_specs(36)),
    "DeepSeek-V3": (DEEPSEEK_V3, lambda: [latent()] * 61),
    "Qwen3.5 27B": (QWEN_35_27B, lambda: [*[gated_delta()] * 3, full(4, 256)] * 16),
    "Granite 4 small": (GRANITE_4_SMALL, lambda: [*[mamba2()] * 36, *[full(8, 128)] * 4]),
}


def pages(specs, context):
    """Bytes of the pages that a decoding sequence holds: whole blocks, by vLLM's classes."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec

    total = 0
    for spec in specs:
        if isinstance(spec, MambaSpec):
            blocks = 1
        elif isinstance(spec, FullAttentionSpec):
            blocks = -(-context // BLOCK)
        else:
            blocks = spec.max_admission_blocks_per_request(1, context)
        total += blocks * spec.page_size_bytes
    return total


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("context", [16, 4096, CONTEXT])
def test_a_sequence_holds_what_vllms_pages_hold(name, context):
    config, specs = SPECS[name]
    counted = model_shape(config).cache_bytes(BYTES, context)
    held = pages(specs(), context)
    # vLLM keeps at most two blocks more of each window: one cut off at either end.
    slack = sum(
        2 * s.page_size_bytes for s in specs() if hasattr(s, "sliding_window") and s.sliding_window
    )
    assert counted <= held <= counted + slack
    if not slack:
        assert counted == held


def capacity(specs, budget, *, one_table):
    """Tokens in requests of CONTEXT that vLLM's own functions fit into `budget` bytes."""
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec, replace_as
    from vllm.v1.kv_cache_layout import KVCacheLayout

    if one_table:
        drop = ("sliding_window", "extra_retained_tokens")
        specs = {
            name: replace_as(s, FullAttentionSpec, drop=drop)
            if isinstance(s, SlidingWindowSpec)
            else s
            for name, s in specs.items()
        }
    cache = SimpleNamespace(
        get_resolved_kv_cache_layout=lambda: KVCacheLayout["LBNHC"],
        num_gpu_blocks_override=None,
        prefix_cache_retention_interval=None,
        mamba_cache_mode="none",
        block_size=BLOCK,
        enable_prefix_caching=True,
        prefix_match_unit=None,
    )
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        cache_config=cache,
        attention_config=SimpleNamespace(hisparse_config=None),
        speculative_config=None,
        model_config=SimpleNamespace(max_model_len=CONTEXT),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1, tensor_parallel_size=1),
        max_in_flight_tokens=1,
        kv_transfer_config=None,
    )
    groups = kv_cache_utils.get_kv_cache_groups(config, specs)
    built = kv_cache_utils.get_kv_cache_config_from_groups(config, groups, budget)
    requests = kv_cache_utils.get_max_concurrency_for_kv_cache_config(config, built)
    return requests * CONTEXT


def layers(base, small):
    roles = {"base": base, "expert": small, "antiexpert": small}
    return {f"{role}.layers.{i}": s for role, specs in roles.items() for i, s in enumerate(specs)}


def aligned(specs):
    """Attention blocks so long that a state fits into a page, as the composite aligns them."""
    from vllm.v1.kv_cache_interface import MambaSpec

    row = max(s.page_size_bytes // BLOCK for s in specs.values() if not isinstance(s, MambaSpec))
    states = [s.page_size_bytes for s in specs.values() if isinstance(s, MambaSpec)]
    if not states:
        return specs
    block = BLOCK * -(-max(states) // (BLOCK * row))
    return {
        name: dataclasses.replace(s, page_size_padded=block * row)
        if isinstance(s, MambaSpec)
        else dataclasses.replace(s, block_size=block)
        for name, s in specs.items()
    }


@pytest.mark.parametrize(
    "base, small, base_specs, small_specs",
    [
        (LLAMA_3_8B, LLAMA_3_1B, SPECS["Llama 3.1 8B"][1], lambda: [full(8, 64)] * 16),
        (GEMMA_3_27B, GEMMA_3_1B, SPECS["Gemma 3 27B"][1], SPECS["Gemma 3 1B"][1]),
        (GPT_OSS_120B, GPT_OSS_20B, SPECS["gpt-oss-120b"][1], lambda: gpt_oss_specs(24)),
        (DEEPSEEK_V3, DEEPSEEK_V3, SPECS["DeepSeek-V3"][1], SPECS["DeepSeek-V3"][1]),
        (LLAMA_3_8B, GEMMA_3_1B, SPECS["Llama 3.1 8B"][1], SPECS["Gemma 3 1B"][1]),
        (QWEN_35_27B, QWEN_35_27B, SPECS["Qwen3.5 27B"][1], SPECS["Qwen3.5 27B"][1]),
        (
            GRANITE_4_SMALL,
            GRANITE_4_SMALL,
            SPECS["Granite 4 small"][1],
            SPECS["Granite 4 small"][1],
        ),
        (QWEN_35_27B, LLAMA_3_1B, SPECS["Qwen3.5 27B"][1], lambda: [full(8, 64)] * 16),
    ],
    ids=[
        "Llama 3",
        "Gemma 3",
        "gpt-oss",
        "DeepSeek-V3",
        "Llama 3 with Gemma 3",
        "Qwen3.5",
        "Granite 4",
        "Qwen3.5 with Llama 3",
    ],
)
def test_capacity_of_a_trio_is_vllms(base, small, base_specs, small_specs):
    base, small = model_shape(base), model_shape(small)
    weights = (base.weight_bytes(BYTES) + 2 * small.weight_bytes(BYTES)) / GIB
    gpu = Gpu("big", bandwidth_tbps=4.3, tflops=790.0, memory_gib=weights + 40, source="given")
    result = plan(base, small, small, gpu, context=CONTEXT, gpu_memory_utilization=1, reserve_gib=0)
    specs = aligned(layers(base_specs(), small_specs()))
    one_table = capacity(specs, 40 << 30, one_table=True)
    tables = capacity(specs, 40 << 30, one_table=False)
    assert result.kv_tokens_one_table == pytest.approx(one_table, rel=0.01)
    assert result.kv_tokens == pytest.approx(max(tables, one_table), rel=0.01)


def test_floor_of_states_and_latents_by_hand():
    """Bytes a decode step moves at 32k: latents read once, windows alone, states both ways."""
    moved = {
        name: step_floor([model_shape(SPECS[name][0])], SLOW, context=CONTEXT).attention_ms * 1e6
        for name in SPECS
    }
    assert moved["DeepSeek-V3"] == pytest.approx(61 * 576 * 2 * CONTEXT)
    assert moved["Gemma 3 27B"] == pytest.approx((10 * CONTEXT + 52 * 1024) * 2 * 16 * 128 * 2)
    assert moved["gpt-oss-120b"] == pytest.approx((18 * CONTEXT + 18 * 128) * 2 * 8 * 64 * 2)
    delta = 48 * (3 * (2 * 16 + 48) * 128 * 2 + 48 * 128 * 128 * 4)
    assert moved["Qwen3.5 27B"] == pytest.approx(16 * CONTEXT * 2 * 4 * 256 * 2 + 2 * delta)
    mamba = 36 * (3 * (128 * 64 + 2 * 128) + 128 * 64 * 128) * 2
    assert moved["Granite 4 small"] == pytest.approx(4 * CONTEXT * 2 * 8 * 128 * 2 + 2 * mamba)
