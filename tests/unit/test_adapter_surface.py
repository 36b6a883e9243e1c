"""What users meet of adapters that bring a tokenizer, a chat template and end tokens."""

import json
import shutil
from pathlib import Path

import pytest
from adapter_files import make_adapter
from transformers import AutoTokenizer
from twins import write_twins

from proxy_vllm import ProxyConfig
from proxy_vllm.engine_args import prepare_engine_args


@pytest.fixture(scope="module")
def twins(tmp_path_factory) -> dict[str, str]:
    return write_twins("qwen2.5", tmp_path_factory.mktemp("qwen2.5"))


def adapter(folder: Path, twins: dict[str, str], surface: str | None = None) -> str:
    """An adapter of the antiexpert, with another model's tokenizer beside it."""
    make_adapter(folder, twins["antiexpert"])
    if surface is not None:
        for file in Path(surface).iterdir():
            if file.name.startswith(("tokenizer", "chat_template", "special_tokens")):
                shutil.copy(file, folder)
    return str(folder)


def prepare(twins: dict[str, str], adapters: dict[str, str]):
    """Engine arguments, and the end tokens that they name."""
    out = prepare_engine_args(
        {
            "model": twins["model"],
            "dtype": "float32",
            "enable_lora": True,
            "lora_modules": adapters,
        },
        ProxyConfig(expert="", antiexpert=twins["antiexpert"], adapters=True),
    )
    # vLLM itself ends answers at the tokenizer's own end token.
    ends = {AutoTokenizer.from_pretrained(out["tokenizer"]).eos_token_id}
    if (folder := out.get("generation_config")) is not None:
        ends |= set(json.loads(Path(folder, "generation_config.json").read_text())["eos_token_id"])
    return out, ends


def test_the_surface_that_adapters_share_is_the_engines(twins, tmp_path):
    plain = adapter(tmp_path / "plain", twins)
    tuned = adapter(tmp_path / "tuned", twins, twins["expert"])
    again = adapter(tmp_path / "again", twins, twins["expert"])
    out, ends = prepare(twins, {"plain": plain, "tuned": tuned, "again": again})
    assert out["tokenizer"] == tuned
    assert AutoTokenizer.from_pretrained(twins["expert"]).eos_token_id in ends
    out, _ = prepare(twins, {"plain": plain})
    assert out["tokenizer"] == twins["antiexpert"]


def test_surfaces_that_differ_are_named(twins, tmp_path, caplog_vllm):
    tuned = adapter(tmp_path / "tuned", twins, twins["expert"])
    other = Path(adapter(tmp_path / "other", twins, twins["expert"]))
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(other)
    out, ends = prepare(twins, {"tuned": tuned, "other": str(other)})
    assert out["tokenizer"] == twins["antiexpert"]
    assert tokenizer.eos_token_id in ends
    assert any("'tuned', 'other' bring chat templates that differ" in t for t in caplog_vllm)

    grown = Path(adapter(tmp_path / "grown", twins, twins["expert"]))
    tokenizer = AutoTokenizer.from_pretrained(grown)
    tokenizer.add_tokens(["<|new|>"])
    tokenizer.save_pretrained(grown)
    out, _ = prepare(twins, {"grown": str(grown)})
    assert out["tokenizer"] == twins["antiexpert"]
    assert any("'grown' brings a tokenizer in which token" in text for text in caplog_vllm)


@pytest.fixture
def caplog_vllm():
    """What the surface says; vLLM's loggers pass nothing on to pytest's."""
    import logging

    from proxy_vllm.engine_args import _configure_logging

    _configure_logging({})
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("vllm.proxy_vllm.surface")
    logger.addHandler(handler)
    yield said
    logger.removeHandler(handler)
