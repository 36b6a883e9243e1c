"""Members are configured without touching the engine's configuration, and by their own layer names.

Engines on H100s are configured in processes of their own, on a machine without a GPU.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]

COMMON = {
    "torch_dtype": "bfloat16",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "max_position_embeddings": 8192,
    "vocab_size": 151936,
    "num_hidden_layers": 2,
    "head_dim": 128,
    "tie_word_embeddings": False,
}
DENSE = {**COMMON, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"} | {
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
MOE = {**COMMON, "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"} | {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "decoder_sparse_step": 1,
    "norm_topk_prob": True,
    "mlp_only_layers": [],
}
LARGE = {**DENSE, "hidden_size": 5120, "num_attention_heads": 40, "intermediate_size": 17408}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def folder(path: Path, config: dict) -> str:
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


QUANTISED_MOE = {**MOE, "quantization_config": FP8}
QUANTISED_DENSE = {**DENSE, "quantization_config": FP8}
TRIOS = {
    "mixture over dense, data parallel": (MOE, DENSE, {"data_parallel_size": 2}),
    "FP8 mixture over FP8 dense": (QUANTISED_MOE, QUANTISED_DENSE, {"tensor_parallel_size": 4}),
    "dense over narrower": (LARGE, DENSE, {"tensor_parallel_size": 4}),
    "dense over wider": (DENSE, LARGE, {"tensor_parallel_size": 4}),
}


@pytest.fixture(scope="module")
def configured(tmp_path_factory) -> dict[str, dict]:
    """What ``h100_members.py`` finds of each trio, and what is logged meanwhile."""
    root = tmp_path_factory.mktemp("trios")
    trios = []
    for name, (base, small, args) in TRIOS.items():
        models = {
            role: folder(root / name / role, config)
            for role, config in (("base", base), ("expert", small), ("antiexpert", small))
        }
        args = {"model": models.pop("base"), "max_model_len": 4096, **args}
        trios.append((name, args, models))
    env = dict(os.environ, VLLM_LOGGING_LEVEL="INFO")
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    for name in ("TRITON_INTERPRET", "PROXY_VLLM_CPU_RUNNER", "VLLM_USE_V2_MODEL_RUNNER"):
        env.pop(name, None)
    done = subprocess.run(
        [sys.executable, ROOT / "tests/h100_members.py", json.dumps(trios)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        env=env,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    parts = dict(part.split("\n", 1) for part in done.stdout.split("BEGIN ")[1:])
    return {
        name: json.loads(log.split("RESULT ")[1].splitlines()[0]) | {"log": log}
        for name, log in parts.items()
    }


@pytest.mark.parametrize("name", TRIOS)
def test_members_leave_the_engines_configuration_as_it_was(configured, name):
    base, small, _ = TRIOS[name]
    result, members = configured[name], (base, small, small)
    assert result["device"] == "PretendedH100"
    assert result["changed"] == {}
    assert result["shared"] == [True] * 3  # one table of attention layers
    assert result["architectures"] == [m["architectures"][0] for m in members]
    assert result["moe"] is (base["model_type"] == "qwen3_moe")
    assert result["quantised"] == ["fp8" if "quantization_config" in m else None for m in members]


def test_all_reduces_are_fused_unless_a_small_member_is_wider(configured):
    narrow, wide = configured["dense over narrower"], configured["dense over wider"]
    assert narrow["fused"] is True and "All-reduces are not fused" not in narrow["log"]
    assert wide["fused"] is False and wide["log"].count("All-reduces are not fused") == 1


# Layers of a model, and those that each list form below leaves unquantised.
LAYERS = ["model.layers.0.mlp.gate", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
FIRST = {LAYERS[0], LAYERS[1]}
FORMS = {
    "fp8, whole names": (FP8 | {"modules_to_not_convert": sorted(FIRST)}, FIRST),
    "fp8, ignored_layers": (FP8 | {"ignored_layers": sorted(FIRST)}, FIRST),
    "compressed-tensors, names and a regular expression": (
        {
            "quant_method": "compressed-tensors",
            "format": "int-quantized",
            "ignore": [LAYERS[0], r"re:model\.layers\.0\..*down_proj"],
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": {
                        "num_bits": 8,
                        "type": "int",
                        "symmetric": True,
                        "strategy": "channel",
                    },
                    "input_activations": {"num_bits": 8, "type": "int", "symmetric": True}
                    | {"strategy": "token", "dynamic": True},
                }
            },
        },
        FIRST,
    ),
    "awq, parts of names": (
        {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True}
        | {"modules_to_not_convert": ["layers.0."]},
        FIRST,
    ),
    "gptq, rules by regular expression": (
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
        | {
            "dynamic": {r"-:^model\.layers\.0\.": {}},
            "modules_in_block_to_quantize": ["proj", "gate"],
        },
        FIRST,
    ),
    "gptq, layers to quantise": (
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
        | {"modules_in_block_to_quantize": [LAYERS[2]]},
        FIRST,
    ),
    "modelopt, wildcards": (
        {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["model.layers.0*"]},
        FIRST,
    ),
}


def unquantised(config, prefix: str) -> set[str]:
    """The layers, by their own names, that a quantisation leaves as they are."""
    from vllm.model_executor.layers.linear import ReplicatedLinear, UnquantizedLinearMethod

    layer = ReplicatedLinear.__new__(ReplicatedLinear)
    torch.nn.Module.__init__(layer)
    layer.input_size = layer.input_size_per_partition = 64
    layer.output_size = layer.output_size_per_partition = 64
    layer.output_partition_sizes = [64]
    layer.params_dtype = torch.bfloat16
    return {
        name
        for name in LAYERS
        if isinstance(config.get_quant_method(layer, f"{prefix}{name}"), UnquantizedLinearMethod)
    }


@pytest.mark.parametrize("form, expected", FORMS.values(), ids=FORMS.keys())
def test_lists_of_layers_are_read_by_the_members_own_names(form, expected, monkeypatch):
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.quantization import (
        auto_awq,
        auto_gptq,
        fp8,
        get_quantization_config,
        modelopt,
    )

    from proxy_vllm.composite.quantization import for_member

    for module in (auto_awq, auto_gptq):  # they ask for kernels that a CPU has not
        monkeypatch.setattr(module, "verify_marlin_supported", lambda **kwargs: None)
    monkeypatch.setattr(modelopt, "build_linear_method", lambda *args: None)
    monkeypatch.setattr(fp8, "Fp8LinearMethod", lambda config: SimpleNamespace())
    name = {"awq": "auto_awq", "gptq": "auto_gptq"}.get(form["quant_method"], form["quant_method"])
    alone = get_quantization_config(name).from_config(form)
    with set_current_vllm_config(VllmConfig()):
        assert unquantised(alone, "") == expected
        if form["quant_method"] == "fp8":
            assert unquantised(alone, "base.") == set(), "the composite's names need no mapping"
        for role in ("base", "expert", "antiexpert"):
            own = for_member(alone, role)
            assert isinstance(own, type(alone))
            assert unquantised(own, f"{role}.") == expected
        assert unquantised(alone, "") == expected


def test_mxfp4_leaves_out_layers_by_their_own_names():
    """vLLM 0.32.0 multiplies dense layers unquantised in any case; the list must still be read."""
    from vllm.model_executor.layers.quantization import mxfp4

    from proxy_vllm.composite.quantization import for_member

    asked = []
    real = mxfp4.is_layer_skipped
    own = for_member(mxfp4.Mxfp4Config(ignored_layers=[LAYERS[0]]), "expert")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            mxfp4, "is_layer_skipped", lambda **kw: asked.append((kw["prefix"], real(**kw)))
        )
        unquantised(own, "expert.")
    assert asked == [(LAYERS[0], True), (LAYERS[1], False), (LAYERS[2], False)]
