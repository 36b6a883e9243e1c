"""Whose tokenizer, chat template, end tokens and sampling defaults an engine is given."""

import dataclasses
import json
import logging
from pathlib import Path

import pytest
from twins import FAMILIES, templates, write_twins

from proxy_vllm import ProxyConfig
from proxy_vllm.engine_args import _configure_logging, prepare_engine_args
from proxy_vllm.errors import UserError

PLAIN = "--expert-chat-template auto --base-chat-template plain"


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    made: dict[str, dict[str, str]] = {}

    def make(name: str) -> dict[str, str]:
        if name not in made:
            made[name] = write_twins(name, tmp_path_factory.mktemp(name))
        return made[name]

    return make


@pytest.fixture
def prepare():
    """Engine arguments of a trio, their generation_config.json, and what is said of them."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("vllm.proxy_vllm.surface")

    def prepare(trio: dict[str, str], **options):
        names = {f.name for f in dataclasses.fields(ProxyConfig)}
        given = {**trio, **options}
        said.clear()
        base_template = given.pop("base_chat_template", None)
        caps = given.pop("caps_max_tokens", False)
        out = prepare_engine_args(
            {k: v for k, v in {"dtype": "float32", **given}.items() if k not in names},
            ProxyConfig(**{k: v for k, v in given.items() if k in names}),
            base_chat_template=base_template,
            caps_max_tokens=caps,
        )
        folder = out.get("generation_config", "auto")
        config = None
        if folder not in ("auto", "vllm"):
            config = json.loads(Path(folder, "generation_config.json").read_text())
        return out, config, list(said)

    _configure_logging({})  # the first time it takes handlers away
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel("INFO")
    yield prepare
    logger.setLevel(level)
    logger.removeHandler(handler)


def edit(folder: str, file: str, **fields) -> None:
    path = Path(folder, file)
    data = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**data, **fields}))


def test_a_base_without_a_template_shows_the_expert(twins, prepare):
    trio = twins("llama-3.1")
    out, config, said = prepare(trio)
    assert out["tokenizer"] == trio["expert"]
    assert out.get("chat_template") is None  # the tokenizer has it
    assert config["eos_token_id"] == [401, 408, 409]
    assert (config["temperature"], config["top_p"]) == (0.6, 0.9)
    assert len(said) == 1, said
    (line,) = said
    for part in (
        "the expert's tokenizer",
        "the expert's chat template",
        "the expert's sampling defaults",
        "'<|eot_id|>' (409) of expert",
        "'<|end_of_text|>' (401) of expert",
    ):
        assert part in line
    assert "\n" not in line


def test_whose_end_tokens(twins, prepare):
    trio = twins("smollm2")
    assert prepare(trio)[1]["eos_token_id"] == [0, 2]
    assert prepare(trio, stop_tokens="expert")[1]["eos_token_id"] == [2]
    out, config, _ = prepare(trio, stop_tokens="base")
    # vLLM ends answers at the tokenizer's end token in any case, so it is the base's.
    assert out.get("tokenizer") is None and config is not None and config["eos_token_id"] == [0]
    assert "<|im_start|>" in out["chat_template"]
    with pytest.raises(UserError, match=r"stop_tokens is 'mine'.*expert, base, both"):
        prepare(trio, stop_tokens="mine")
    with pytest.raises(UserError, match=r"--stop-tokens expert: .* '<\|endoftext\|>' \(0\)"):
        prepare(trio, stop_tokens="expert", tokenizer=trio["model"])


def test_an_end_token_in_any_file_counts(tmp_path, prepare):
    """Of the tokenizer, generation_config.json and config.json; a list, or none at all."""
    trio = write_twins("gemma", tmp_path)
    edit(trio["expert"], "config.json", eos_token_id=[1, 20, 30])
    edit(trio["model"], "generation_config.json", eos_token_id=40)
    assert prepare(trio)[1]["eos_token_id"] == [1, 20, 30, 40]
    Path(trio["expert"], "generation_config.json").unlink()
    assert prepare(trio)[1]["eos_token_id"] == [1, 20, 30, 40]
    # Configuration classes invent an end token for files that name none.
    config = json.loads(Path(trio["expert"], "config.json").read_text())
    del config["eos_token_id"]
    Path(trio["expert"], "config.json").write_text(json.dumps(config))
    edit(trio["expert"], "generation_config.json", eos_token_id=[20])
    assert prepare(trio)[1]["eos_token_id"] == [1, 20, 40]


def test_the_users_generation_config_wins(twins, prepare, tmp_path):
    trio = twins("llama-3.1")
    own = tmp_path / "own"
    own.mkdir()
    edit(str(own), "generation_config.json", temperature=0.3, eos_token_id=7, max_new_tokens=9)
    out, config, said = prepare(trio, generation_config=str(own), caps_max_tokens=True)
    assert out["generation_config"] == str(own)  # as it is
    assert (config["temperature"], config["max_new_tokens"]) == (0.3, 9)
    assert f"--generation-config {own}'s sampling defaults" in said[-1]
    # The end token of the tokenizer is one in any case, as for a single model.
    assert "end tokens '(' (7) of --generation-config, '<|eot_id|>' (409) of the t" in said[-1]
    edit(str(own), "generation_config.json", eos_token_id=None)
    assert prepare(trio, generation_config=str(own))[1]["eos_token_id"] == [401, 408, 409]

    out, config, said = prepare(trio, generation_config="vllm")
    assert config == {"eos_token_id": [401, 408, 409]} and "vLLM's sampling defaults" in said[-1]
    # vLLM itself reads no end tokens of this option.
    out, config, _ = prepare(trio, override_generation_config={"eos_token_id": [8], "top_k": 3})
    assert set(config["eos_token_id"]) == {8, 409} and config["temperature"] == 0.6
    assert out["override_generation_config"]["top_k"] == 3


def test_the_experts_limit_caps_no_request(tmp_path, prepare):
    trio = write_twins("smollm2", tmp_path)
    edit(trio["expert"], "generation_config.json", max_new_tokens=5, temperature=0.5)
    assert prepare(trio)[1]["max_new_tokens"] == 5
    server = prepare(trio, caps_max_tokens=True)[1]
    assert "max_new_tokens" not in server and server["temperature"] == 0.5


def test_nothing_is_written_where_vllm_reads_the_same(prepare, trio):
    out, config, _ = prepare(trio)
    assert config is None and out.get("chat_template") is None


@pytest.mark.parametrize("source", ["files", "generation_config", "override"])
def test_end_tokens_past_the_bases_vocabulary_reach_no_engine(tmp_path, prepare, source):
    trio = write_twins("llama-2", tmp_path)
    options = {}
    if source == "files":
        edit(trio["expert"], "generation_config.json", eos_token_id=[2, 32000])
    elif source == "generation_config":
        edit(str(tmp_path), "generation_config.json", eos_token_id=[2, 32000], top_k=5)
        options = {"generation_config": str(tmp_path)}
    else:
        options = {"override_generation_config": {"eos_token_id": [2, 32000, -1]}}
    out, config, said = prepare(trio, **options)
    assert out.get("generation_config") != str(tmp_path)
    assert config is None or config["eos_token_id"] == [2]  # None: the base's file, which is sound
    assert any("32000" in line and "vocabulary of 484" in line for line in said), said


def chatml_over_llama2(root):
    """A fine-tune that added ChatML past its base's vocabulary."""
    family = FAMILIES["llama-2"]
    turn = "<|im_end|>"
    tuned = dataclasses.replace(
        family.tuned,
        config={"eos_token_id": turn},
        generation={"eos_token_id": turn},
        tokenizer={**family.tuned.tokenizer, "eos_token": turn},
        template=templates.chatml("Be kind."),
        more=("<|im_start|>", turn),
    )
    return write_twins(dataclasses.replace(family, ends=(turn,)), root, tuned=tuned)


def test_chatml_past_the_bases_vocabulary_is_said_with_the_way_out(tmp_path, prepare, monkeypatch):
    trio = chatml_over_llama2(tmp_path)
    out, config, said = prepare(trio)
    assert out.get("tokenizer") is None
    assert config is None or config["eos_token_id"] == [2]
    text = "\n".join(said)
    assert "'<|im_end|>' (485) lies past the base's vocabulary of 484" in text
    assert "writes '<|im_start|>' (484), '<|im_end|>' (485), which the base's tokenizer" in text
    assert PLAIN in text
    # The way out names nothing any more, and the expert alone reads its tokens.
    monkeypatch.setattr("proxy_vllm.engine_args._excludes_own_prompts", lambda *args: None)
    out, _, said = prepare(trio, expert_chat_template="auto", base_chat_template="plain")
    assert "<|im_start|>" not in out["chat_template"]
    assert not any("writes" in line for line in said)


def test_a_pad_token_past_the_bases_vocabulary(twins, prepare):
    trio = twins("tulu-2")
    out, _, said = prepare(trio)
    assert out.get("tokenizer") is None and "<|assistant|>" in out["chat_template"]
    assert "has '<pad>' (484) past the base's vocabulary" in said[-1]
    with pytest.raises(UserError, match=r"--tokenizer .*'<pad>' .*vocabulary of 484"):
        prepare(trio, tokenizer=trio["expert"])


def test_whose_template(twins, prepare, tmp_path, monkeypatch):
    trio = twins("qwen2.5")  # whose base has one too
    own = tmp_path / "own.jinja"
    own.write_text("{{ messages[0].content }}")
    assert prepare(trio)[0].get("chat_template") is None
    assert prepare(trio, chat_template=str(own))[0]["chat_template"] == str(own)
    assert prepare(trio, base_chat_template=str(own))[0]["chat_template"] == own.read_text()
    out, _, said = prepare(trio, base_chat_template="auto")
    assert "the base's chat template" in said[-1] and "Alibaba" not in out["chat_template"]
    with pytest.raises(UserError, match="--base-chat-template and --chat-template"):
        prepare(trio, base_chat_template="plain", chat_template=str(own))
    with pytest.raises(UserError, match="base's tokenizer has no chat template"):
        prepare(twins("smollm2"), base_chat_template="auto")
    # A member that reads its own template has the base read its own as well, if there is one.
    monkeypatch.setattr("proxy_vllm.engine_args._excludes_own_prompts", lambda *args: None)
    said = prepare(trio, expert_chat_template="auto")[2]
    assert "the base's chat template" in said[-1]
    said = prepare(twins("smollm2"), expert_chat_template="auto")[2]
    assert "the expert's chat template" in said[-1]


def test_an_expert_without_a_template_reads_the_bases(tmp_path, prepare):
    trio = write_twins("qwen2.5", tmp_path)
    config = json.loads(Path(trio["expert"], "tokenizer_config.json").read_text())
    template = config.pop("chat_template")
    Path(trio["expert"], "tokenizer_config.json").write_text(json.dumps(config))
    out, _, said = prepare(trio)
    assert "<|im_start|>" in out["chat_template"] and out["chat_template"] != template
    assert "the base's chat template" in said[-1]


def test_an_engine_without_tokenizers(twins, prepare):
    trio = twins("smollm2")
    out, config, _ = prepare(trio, skip_tokenizer_init=True)
    assert out.get("tokenizer") is None and out.get("chat_template") is None
    assert config["eos_token_id"] == [0, 2]


def test_the_users_tokenizer_wins(twins, prepare):
    trio = twins("qwen2.5")
    out, config, said = prepare(trio, tokenizer=trio["model"])
    assert out["tokenizer"] == trio["model"] and "the tokenizer of --tokenizer" in said[-1]
    assert "Alibaba" in out["chat_template"] and config["eos_token_id"] == [400, 402]
