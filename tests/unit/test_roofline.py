"""The model of cost against published counts, Transformers' own models and hand counts."""

import json

import pytest

from proxy_vllm.errors import UserError
from proxy_vllm.plan.config_file import load_config
from proxy_vllm.plan.gpus import GPUS, Gpu, find_gpu
from proxy_vllm.plan.model_size import ElementBytes, attended, model_shape
from proxy_vllm.plan.roofline import GIB, RESERVE_GIB, plan, step_floor


def llama(hidden, layers, heads, kv_heads, ffn, vocab, tied=False, **more):
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": ffn,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        **more,
    }


LLAMA_3_8B = llama(4096, 32, 32, 8, 14336, 128256)
LLAMA_3_1B = llama(2048, 16, 32, 8, 8192, 128256, tied=True, head_dim=64)
LLAMA_2_13B = llama(5120, 40, 40, 40, 13824, 32000)
LLAMA_2_7B = llama(4096, 32, 32, 32, 11008, 32000)
MISTRAL_7B = {
    **llama(4096, 32, 32, 8, 14336, 32000, sliding_window=None),
    "model_type": "mistral",
}
MIXTRAL = {**MISTRAL_7B, "model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
QWEN_05B = {**llama(896, 24, 14, 2, 4864, 151936, tied=True), "model_type": "qwen2"}
QWEN3_06B = {
    **llama(1024, 28, 16, 8, 3072, 151936, tied=True, head_dim=128),
    "model_type": "qwen3",
}
# The hub's files for these two leave tie_word_embeddings out: the class's default holds.
GPT2 = {
    "model_type": "gpt2",
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_positions": 1024,
    "vocab_size": 50257,
}
OPT_125M = {
    "model_type": "opt",
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "ffn_dim": 3072,
    "max_position_embeddings": 2048,
    "vocab_size": 50272,
    "word_embed_proj_dim": 768,
}
# 3 matrices' worth of numbers that a person can add up: see `test_hand_computed_step`.
TINY = llama(64, 2, 4, 2, 128, 1000, head_dim=16)
BYTES = ElementBytes(2, 2)
# 1e9 bytes/s and 1e12 FLOP/s: a byte is a nanosecond.
SLOW = Gpu("slow", bandwidth_tbps=1e-3, tflops=1.0, memory_gib=1.0, source="given")


@pytest.mark.parametrize(
    "config, published",
    [
        (LLAMA_3_8B, 8_030_261_248),
        (LLAMA_3_1B, 1_235_814_400),
        (LLAMA_2_13B, 13_015_864_320),
        (LLAMA_2_7B, 6_738_415_616),
        (MISTRAL_7B, 7_241_732_096),
        (MIXTRAL, 46_702_792_704),
        (QWEN_05B, 494_032_768),
        (QWEN3_06B, 596_049_920),
        (GPT2, 124_439_808),
        (OPT_125M, 125_239_296),
    ],
)
def test_parameters_equal_the_published_count(config, published):
    assert model_shape(config).num_params == published


@pytest.mark.parametrize(
    "batch, step, base_step",
    [(1, 4.69, 3.52), (8, 5.02, 3.74), (64, 7.65, 5.49), (256, 18.5, 12.9)],
)
def test_design_floors_8b_and_two_1b(batch, step, base_step):
    result = plan(LLAMA_3_8B, LLAMA_3_1B, LLAMA_3_1B, "h200", batch=batch, context=1024)
    assert result.step_ms == pytest.approx(step, rel=4e-3)
    assert result.base_step_ms == pytest.approx(base_step, rel=4e-3)
    assert result.ratio == pytest.approx(base_step / step, rel=8e-3)


@pytest.mark.parametrize(
    "batch, step, base_step", [(1, 12.6, 6.2), (8, 15.7, 7.5), (64, 40.6, 18.5)]
)
def test_design_floors_13b_and_two_7b(batch, step, base_step):
    result = plan(LLAMA_2_13B, LLAMA_2_7B, LLAMA_2_7B, "h200", batch=batch, context=1024)
    assert result.step_ms == pytest.approx(step, abs=0.05)
    assert result.base_step_ms == pytest.approx(base_step, abs=0.05)


@pytest.mark.parametrize("batch, micros", [(1, 0.2), (8, 1.4), (64, 11.5), (256, 45.8)])
def test_design_floor_of_combine_and_sample(batch, micros):
    shapes = [model_shape(c) for c in (LLAMA_3_8B, LLAMA_3_1B, LLAMA_3_1B)]
    floor = step_floor(shapes, GPUS["h200"], batch=batch)
    assert floor.sampling_ms * 1e3 == pytest.approx(micros, abs=0.05)


def test_hand_computed_step():
    # One layer: q 64*64 + k 64*32 + v 64*32 + o 64*64 = 12288; MLP 3 * 64*128 = 24576.
    # Two layers: 73728. Head: 1000*64 = 64000. Norms: 5 * 64 = 320. Sum 138048, 2 bytes: 276096.
    # Token table: 64000 more parameters in memory, 404096 bytes in all.
    # KV: 2 (K, V) * 2 heads * 16 * 2 layers * 2 bytes = 256 bytes a token.
    shape = model_shape(TINY)
    assert shape.step_weight_bytes(BYTES, 3) == 276_096
    assert shape.weight_bytes(BYTES) == 404_096
    assert shape.cache_bytes(BYTES, 1) == 256
    # Memory-bound at 3 rows of 10 tokens: 276096 + 3*10*256 = 7680 + logits 3*1000*2 = 6000 bytes.
    alone = step_floor([shape], SLOW, batch=3, context=10)
    assert alone.matmul_ms == pytest.approx(0.276096)
    assert alone.attention_ms == pytest.approx(0.007680)
    assert alone.sampling_ms == pytest.approx(0.006000)
    result = plan(TINY, TINY, TINY, SLOW, batch=3, context=10, reserve_gib=0.5)
    assert result.base_step_ms == pytest.approx(0.289776)
    assert result.step_ms == pytest.approx(3 * 0.289776)
    assert result.ratio == pytest.approx(1 / 3)
    assert result.slowdown == pytest.approx(3)
    assert result.tokens_per_s == pytest.approx(3 / (3 * 0.289776e-3))
    # Memory: 0.9 GiB - 0.5 GiB - 3 * 404096 bytes = 428284441.6 bytes, over 3 * 256 bytes a token:
    # 0.4 * 2**30 = 429496729.6; minus 1212288 = 428284441.6; / 768 = 557662.03.
    assert result.kv_tokens == 557_662
    # Base alone: (429496729.6 - 404096) / 256 = 1676143.10.
    assert result.base_kv_tokens == 1_676_143


def test_arithmetic_bound_at_a_large_batch():
    # 2 * (73728 + 64000) = 275456 operations a row; with 1e12 / 1e9 = 1000 operations a byte the
    # matrices (276096 bytes, 0.276096 ms) are overtaken from 1003 rows on.
    shape = model_shape(TINY)
    below = step_floor([shape], SLOW, batch=1002, context=1)
    above = step_floor([shape], SLOW, batch=2000, context=1)
    assert below.matmul_ms == pytest.approx(0.276096)
    assert above.matmul_ms == pytest.approx(2000 * 275_456 / 1e12 * 1e3)
    # Attention of many query heads on one KV head can be arithmetic-bound on a slow enough GPU:
    # 4 * 64 heads * 128 operations beside 2 * 128 * 2 bytes a token: 64 operations a byte.
    one_kv = model_shape(llama(8192, 1, 64, 1, 128, 1000))
    weak = Gpu("weak", bandwidth_tbps=1.0, tflops=32.0, memory_gib=1.0)
    floor = step_floor([one_kv], weak, batch=4, context=1000)
    assert floor.attention_ms == pytest.approx(4 * 1000 * 4 * 64 * 128 / 32e12 * 1e3)


def test_gpt2_untied_or_not_reads_the_same():
    tied, untied = model_shape(GPT2), model_shape({**GPT2, "tie_word_embeddings": False})
    assert tied.params.tied
    assert not untied.params.tied
    assert untied.weight_bytes(BYTES) - tied.weight_bytes(BYTES) == 50257 * 768 * 2
    assert untied.step_weight_bytes(BYTES, 1) == tied.step_weight_bytes(BYTES, 1)


def test_missing_kv_heads_means_one_a_head_and_head_dim_is_independent():
    config = {k: v for k, v in LLAMA_2_7B.items() if k != "num_key_value_heads"}
    assert model_shape(config).cache_bytes(BYTES, 1) == 524_288  # 2 * 32 * 128 * 32 layers * 2
    assert model_shape(QWEN3_06B).cache_bytes(BYTES, 1) == 2 * 8 * 128 * 28 * 2  # not 1024 / 16


def test_tensor_parallel_splits_weights_and_whole_kv_heads():
    one = plan(LLAMA_3_8B, LLAMA_3_1B, LLAMA_3_1B, "h200", tp=1, batch=8)
    two = plan(LLAMA_3_8B, LLAMA_3_1B, LLAMA_3_1B, "h200", tp=2, batch=8)
    assert two.step_ms == pytest.approx(one.step_ms / 2)
    assert two.kv_bytes_per_token == one.kv_bytes_per_token / 2
    # (139.8*0.9 - 2 - 19.560/2) GiB over 98304 bytes; weights (8030261248 + 2*1235814400)*2 bytes.
    weights = (8_030_261_248 + 2 * 1_235_814_400) * 2
    left = (139.8 * 0.9 - 2) * GIB - weights / 2
    assert two.kv_tokens == int(left // 98304)
    # 16 ranks share 8 KV heads: each holds one, so KV bytes stop shrinking at 8.
    shape = model_shape(LLAMA_3_8B)
    assert shape.cache_bytes(BYTES, 1, tp=16) == shape.cache_bytes(BYTES, 1, tp=8) == 16384


def attends(config, context):
    return sum(attended(cache, context) for cache in model_shape(config).caches)


def test_sliding_windows_shorten_what_attention_reads():
    window = {**MISTRAL_7B, "sliding_window": 4096}
    shape = model_shape(window)
    read = [shape.step_cache_bytes(BYTES, 1, context) for context in (4096, 100_000)]
    assert read[0] == read[1]
    full = model_shape(MISTRAL_7B)
    assert full.step_cache_bytes(BYTES, 1, 100_000) == 100_000 * 131_072
    # Qwen2 writes a window that it does not use.
    qwen = {**QWEN_05B, "sliding_window": 4096, "use_sliding_window": False}
    assert attends(qwen, 100_000) == 24 * 100_000
    gemma = {**TINY, "model_type": "gemma2", "sliding_window": 8}
    assert attends(gemma, 100) == 108
    assert attends({**gemma, "layer_types": ["full_attention"] * 2}, 100) == 200


def test_experts_a_batch_is_expected_to_hit():
    shape = model_shape(MIXTRAL)
    routed = 32 * 8 * 3 * 4096 * 14336
    assert shape.params.routed == routed
    dense = shape.step_weight_bytes(BYTES, 1) - routed * 2 * 2 / 8  # one token hits 2 of 8
    assert shape.step_weight_bytes(BYTES, 10_000) == pytest.approx(dense + routed * 2)
    # Two tokens: 1 - (6/8)^2 = 7/16 of the experts.
    assert shape.step_weight_bytes(BYTES, 2) == pytest.approx(dense + routed * 2 * 7 / 16)
    # 12.9e9 active parameters a token is Mixtral's published figure (its token table included).
    assert shape.step_matmul_flops(1) / 2 == pytest.approx(12.9e9 - 0.13e9, rel=1e-2)


@pytest.mark.parametrize(
    "quant, bits",
    [
        ({"quant_method": "fp8", "activation_scheme": "dynamic"}, 8),
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}, 4 + 20 / 128),
        ({"quant_method": "gptq", "bits": 8, "group_size": 128}, 8 + 16 / 128),
        ({"quant_method": "gptq", "bits": 4, "group_size": -1}, 4),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": {"weights": {"num_bits": 8, "group_size": None}}},
            },
            8,
        ),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 4.5),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, 8),
    ],
)
def test_quantised_members_count_by_bits(quant, bits):
    shape = model_shape({**LLAMA_3_8B, "quantization_config": quant})
    matrices = 6_979_321_856  # 32 * 218103808, by hand; tables, head and norms stay at 16 bits
    rest = 8_030_261_248 - matrices
    assert shape.weight_bytes(BYTES) == pytest.approx(matrices * bits / 8 + rest * 2)
    assert any(quant["quant_method"] in note for note in shape.notes)


def test_unknown_quantisation_is_said_and_not_counted():
    shape = model_shape({**LLAMA_3_8B, "quantization_config": {"quant_method": "quip"}})
    assert shape.weight_bytes(BYTES) == 2 * 8_030_261_248
    assert any("quip" in note for note in shape.notes)


def test_fits_needs_room_for_the_batch_too():
    roomy = plan(LLAMA_3_8B, LLAMA_3_1B, LLAMA_3_1B, "rtx4090")
    assert roomy.fits is False  # 19.6 GiB of weights + 2 in reserve, 23.5 * 0.9 = 21.2
    assert roomy.kv_tokens == 0
    h200 = plan(LLAMA_3_8B, LLAMA_3_1B, LLAMA_3_1B, "h200", batch=1)
    full = plan(LLAMA_3_8B, LLAMA_3_1B, LLAMA_3_1B, "h200", batch=1, context=h200.kv_tokens)
    over = plan(LLAMA_3_8B, LLAMA_3_1B, LLAMA_3_1B, "h200", batch=1, context=h200.kv_tokens + 1)
    assert h200.fits
    assert full.fits
    assert not over.fits
    assert h200.inputs["reserve_gib"] == RESERVE_GIB
    half = plan(LLAMA_3_8B, LLAMA_3_1B, LLAMA_3_1B, "h200", kv_cache_dtype="fp8")
    assert half.kv_tokens in (2 * h200.kv_tokens, 2 * h200.kv_tokens + 1)


def test_result_is_plain_json_with_the_promised_fields():
    result = plan(QWEN_05B, GPT2, GPT2, "l4").to_dict()
    restored = json.loads(json.dumps(result))
    assert restored == result
    assert {"step_ms", "base_step_ms", "ratio", "fits", "kv_tokens"} <= set(result)
    assert result["ratio"] == pytest.approx(result["base_step_ms"] / result["step_ms"])
    # GPT-2 cannot share Qwen's tokenizer: that must not pass in silence.
    assert any("50257" in note and "151936" in note for note in result["notes"])


def test_load_config_reads_folders_files_dicts_and_objects(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(GPT2))
    for source in (tmp_path, str(tmp_path), tmp_path / "config.json", GPT2):
        assert load_config(source)["n_embd"] == 768

    class Config:
        def to_dict(self):
            return dict(GPT2)

    assert model_shape(Config()).num_params == 124_439_808


def test_text_part_of_a_multimodal_config_is_counted():
    """A wrapper's own word on tying holds for its text part, as in vLLM."""
    text = {**LLAMA_3_1B, "tie_word_embeddings": False}
    shape = model_shape({"model_type": "llava", "text_config": text, "tie_word_embeddings": True})
    assert shape.num_params == 1_235_814_400
    assert shape.notes == ("only the text part is counted",)


@pytest.mark.parametrize(
    "config, culprit",
    [
        ({k: v for k, v in TINY.items() if k != "model_type"}, "model_type"),
        ({**TINY, "model_type": "brand_new"}, "model_type 'brand_new'.*update Transformers"),
        ({**TINY, "vocab_size": "many"}, "vocab_size"),
        ({**TINY, "num_hidden_layers": 10**30}, "layers"),
        ({"model_type": "deepseek_v32"}, "indexed_attention"),
        ({"model_type": "hrm_text"}, "several times"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "encoder"),
        ({"model_type": "bert"}, "bert"),
        ({"model_type": "clip"}, "clip"),
        ({"model_type": "deepseek_v2"}, "how many a token takes"),
    ],
)
def test_configs_that_cannot_be_counted_are_refused_by_name(config, culprit):
    with pytest.raises(UserError, match=culprit) as error:
        model_shape(config, name="some/model")
    assert "some/model" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "fields, culprit",
    [
        ({"batch": 0}, "--batch 0"),
        ({"context": -1}, "--context -1"),
        ({"tp": 0}, "--tp 0"),
        ({"tp": 3}, "--tensor-parallel-size 3"),
        ({"gpu_memory_utilization": 1.5}, "--gpu-memory-utilization 1.5"),
        ({"gpu_memory_utilization": float("nan")}, "--gpu-memory-utilization nan"),
        ({"reserve_gib": -1}, "--reserve-gib -1"),
        ({"dtype": "int3"}, "int3"),
        ({"kv_cache_dtype": "int3"}, "int3"),
    ],
)
def test_bad_inputs_are_refused_by_name(fields, culprit):
    with pytest.raises(UserError, match=culprit):
        plan(TINY, TINY, TINY, "h200", **fields)


def test_unknown_gpu_lists_names_and_the_way_out():
    with pytest.raises(UserError) as error:
        find_gpu("voodoo2")
    assert all(word in str(error.value) for word in ("voodoo2", "h200", "--bandwidth-tbps"))
    custom = find_gpu("voodoo2", bandwidth_tbps=0.1, tflops=1, memory_gib=4)
    assert (custom.name, custom.memory_gib) == ("voodoo2", 4)
    part = find_gpu("H200", memory_gib=70)
    assert (part.bandwidth_tbps, part.tflops, part.memory_gib) == (4.3, 790.0, 70)
    with pytest.raises(UserError, match="--tflops"):
        find_gpu("h200", tflops=0)
    with pytest.raises(UserError, match="no GPU given"):
        find_gpu(None, tflops=1)
