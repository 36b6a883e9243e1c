"""Adapters that cannot run whole are refused in one line, before anything is loaded."""

import json
from pathlib import Path

import pytest
import torch
from adapter_files import make_adapter
from safetensors.torch import load_file, save_file
from tiny_models import make_model

from proxy_vllm.errors import UserError


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> str:
    return make_model(tmp_path_factory.mktemp("small") / "small", heads=2, kv_heads=1, layers=2)


def rules(model: str, renumbered: bool = False, **limits):
    from vllm.config import LoRAConfig, ModelConfig

    from proxy_vllm.adapters.check import AdapterRules

    config = ModelConfig(model=model, dtype="float32")
    return AdapterRules.of(config, LoRAConfig(**limits), renumbered)


def refusal(plain: str, path: str, **limits) -> str:
    with pytest.raises(UserError) as error:
        rules(plain, **limits).check("safety", path)
    text = str(error.value)
    assert text.startswith("adapter 'safety' (")
    assert "\n" not in text
    return text


def change(adapter: str, edit) -> str:
    """Write an adapter's tensors again as ``edit`` leaves them."""
    path = Path(adapter) / "adapter_model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return adapter


def test_adapters_that_run(plain, tmp_path):
    known = rules(plain)
    assert known.layers is not None
    for name, targets in {"a": ("q_proj",), "b": ("embed_tokens", "down_proj")}.items():
        known.check(name, make_adapter(tmp_path / name, plain, targets=targets))
    # PEFT saves the table beside an adapter of it.
    saved = make_adapter(tmp_path / "saved", plain, targets=("embed_tokens",))
    table = {"base_model.model.model.embed_tokens.base_layer.weight": torch.zeros(111, 64)}
    known.check("saved", change(saved, lambda tensors: tensors.update(table)))


@pytest.mark.parametrize(
    "fields, reason",
    [
        ({"rank": 32}, "rank 32 is above the server's 16: start with --max-lora-rank 32"),
        ({"rank": 600}, "rank 600 is above the server's 16: vLLM runs none larger"),
        ({"use_dora": True}, "DoRA"),
        ({"lora_bias": True}, "LoRA bias"),
        ({"bias": "all"}, "bias is not supported"),
        ({"modules_to_save": ["lm_head"]}, "lm_head"),
        ({"peft_type": "IA3"}, "type IA3"),
        ({"init_lora_weights": "pissa"}, "PiSSA"),
        ({"targets": ("lm_head", "q_proj")}, "it changes lm_head"),
        ({"targets": ()}, "no LoRA weights"),
    ],
)
def test_kinds_that_vllm_does_not_run(plain, tmp_path, fields, reason):
    assert reason in refusal(plain, make_adapter(tmp_path / "adapter", plain, **fields))


def test_adapters_of_another_model(plain, tmp_path):
    wide = make_model(tmp_path / "wide", hidden=128, heads=4)
    deep = make_model(tmp_path / "deep", heads=2, kv_heads=1, layers=3)
    other = make_model(tmp_path / "other", arch="gpt2")
    path = make_adapter(tmp_path / "a", wide)
    assert "from 256 to 128, which in" in refusal(plain, path)
    assert "it was made for another model" in refusal(plain, path)
    assert "model.layers.2." in refusal(plain, make_adapter(tmp_path / "b", deep))
    assert "does not have" in refusal(plain, make_adapter(tmp_path / "c", other, targets=["c_fc"]))


def test_tables_of_the_adapters_own(plain, tmp_path):
    grown = {"base_model.model.model.embed_tokens.base_layer.weight": torch.zeros(120, 64)}
    path = make_adapter(tmp_path / "a", plain, targets=("embed_tokens",))
    assert "merge the adapter" in refusal(plain, change(path, lambda t: t.update(grown)))
    whole = {"base_model.model.lm_head.weight": torch.zeros(111, 64)}
    path = make_adapter(tmp_path / "b", plain)
    assert "merge the adapter" in refusal(plain, change(path, lambda t: t.update(whole)))
    path = make_adapter(tmp_path / "c", plain, targets=("embed_tokens",))
    with pytest.raises(UserError, match="--tokenizer-map has moved"):
        rules(plain, renumbered=True).check("c", path)


def test_broken_adapters(plain, tmp_path):
    assert "no such folder" in refusal(plain, str(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    assert "no adapter_config.json" in refusal(plain, str(tmp_path / "empty"))
    path = make_adapter(tmp_path / "a", plain)
    half = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert "one of the two" in refusal(plain, change(path, lambda tensors: tensors.pop(half)))
    path = make_adapter(tmp_path / "b", plain)
    settings = json.loads((Path(path) / "adapter_config.json").read_text())
    (Path(path) / "adapter_config.json").write_text(json.dumps({**settings, "r": 8}))
    assert "has rank 4, and adapter_config.json another" in refusal(plain, path)
    (Path(path) / "adapter_model.safetensors").write_bytes(b"\0" * 64)
    assert "cannot be read" in refusal(plain, path)
    (Path(path) / "adapter_model.safetensors").unlink()
    assert "no adapter_model.safetensors" in refusal(plain, path)
    (Path(path) / "adapter_config.json").write_text("{")
    assert "cannot be read" in refusal(plain, path)


def test_layers_that_the_server_leaves_out(plain, tmp_path):
    path = make_adapter(tmp_path / "a", plain, targets=("q_proj", "up_proj"))
    rules(plain, target_modules=["qkv_proj", "gate_up_proj"]).check("a", path)
    assert "--lora-target-modules leaves out" in refusal(plain, path, target_modules=["q_proj"])
