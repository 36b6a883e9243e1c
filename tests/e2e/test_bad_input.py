"""What a user can get wrong before the server starts: one line, exit status 2, no traceback."""

import errno
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from tiny_models import make_model, save_tokenizer

from proxy_vllm.cli.main import main
from proxy_vllm.errors import UserError

SMALL = {"hidden": 32, "heads": 1, "layers": 1}


class Started(Exception):
    """Every check has passed, and a server would start now."""


@pytest.fixture(autouse=True)
def quiet_logging(monkeypatch):
    """vLLM's log handler holds the stream of an earlier test, since commands run in this process.

    pytest has closed it, and each message would print a traceback of its own.
    """
    monkeypatch.setattr(logging, "raiseExceptions", False)


@pytest.fixture(autouse=True)
def no_server(monkeypatch):
    from vllm.entrypoints.cli.serve import ServeSubcommand

    def start(args):
        raise Started

    monkeypatch.setattr(ServeSubcommand, "cmd", staticmethod(start))


def write_config(folder: Path, config: transformers.PretrainedConfig, architecture: str) -> str:
    """A model folder without weights."""
    config.architectures = [architecture]
    config.save_pretrained(folder)
    save_tokenizer(folder, 111)
    return str(folder)


SIZES = {
    "vocab_size": 111,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """A good trio, and one bad member of each kind."""
    root = tmp_path_factory.mktemp("bad")
    made = {
        "base": make_model(root / "base", seed=1),
        "expert": make_model(root / "expert", seed=2, **SMALL),
        "antiexpert": make_model(root / "antiexpert", seed=3, **SMALL),
        "three heads": make_model(root / "three", hidden=96, heads=3, layers=1),
        "short": make_model(root / "short", max_len=128, **SMALL),
        "renamed": make_model(root / "renamed", renamed={40: "forty", 77: "w7", 7: "w77"}, **SMALL),
        "128 tokens": make_model(root / "more", vocab=128, **SMALL),
        "no such folder": str(root / "nowhere"),
    }
    for name in ("no config", "broken config", "no weights", "cut weights", "no tokenizer"):
        made[name] = make_model(root / name.replace(" ", "_"), **SMALL)
        folder = Path(made[name])
        if name == "no config":
            (folder / "config.json").unlink()
        elif name == "broken config":
            (folder / "config.json").write_text('{"model_type": "llama", ')
        elif name == "no weights":
            (folder / "model.safetensors").unlink()
        elif name == "no tokenizer":
            (folder / "tokenizer.json").unlink()
            (folder / "tokenizer_config.json").unlink()
        else:
            whole = (folder / "model.safetensors").read_bytes()
            (folder / "model.safetensors").write_bytes(whole[:-100])
    made["Git LFS pointer"] = make_model(root / "pointer", **SMALL)
    (root / "pointer/model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    made["lost shard"] = make_model(root / "lost", **SMALL)
    shards = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (root / "lost/model.safetensors.index.json").write_text(json.dumps(shards))
    made["lost PyTorch shard"] = make_model(root / "lost_bin", **SMALL)
    (root / "lost_bin/model.safetensors").unlink()
    torch.save({"a": torch.zeros(1)}, root / "lost_bin/pytorch_model-1.bin")
    shards = {"weight_map": {"a": "pytorch_model-1.bin", "b": "pytorch_model-2.bin"}}
    (root / "lost_bin/pytorch_model.bin.index.json").write_text(json.dumps(shards))
    made["cut PyTorch file"] = make_model(root / "cut_bin", **SMALL)
    (root / "cut_bin/model.safetensors").unlink()
    whole = (root / "lost_bin/pytorch_model-1.bin").read_bytes()
    (root / "cut_bin/pytorch_model.bin").write_bytes(whole[:-100])
    made["gpt2"] = make_model(root / "gpt2", **{**SMALL, "arch": "gpt2"})
    made["adapter"] = str(root / "adapter")
    (root / "adapter").mkdir()
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "Qwen/Qwen2.5-1.5B"}
    (root / "adapter/adapter_config.json").write_text(json.dumps(adapter))
    made["gguf"] = str(root / "gguf")
    (root / "gguf").mkdir()
    (root / "gguf/model-Q4_K_M.gguf").write_bytes(b"GGUF")
    made["folder of checkpoints"] = str(root / "run")
    make_model(root / "run/checkpoint-50", **SMALL)
    made["odd architecture"] = make_model(root / "odd", **SMALL)
    config = json.loads((root / "odd/config.json").read_text())
    config["architectures"] = ["LlamaForFortuneTelling"]
    (root / "odd/config.json").write_text(json.dumps(config))
    made["weight file"] = str(root / "expert/model.safetensors")
    made["config alone"] = str(root / "alone")
    (root / "alone").mkdir()
    (root / "alone/config.json").write_text((root / "expert/config.json").read_text())
    made["odd quantization"] = make_model(root / "odd_quantization", **SMALL)
    config = json.loads((root / "odd_quantization/config.json").read_text())
    config["quantization_config"] = {"quant_method": "frobnicate"}
    (root / "odd_quantization/config.json").write_text(json.dumps(config))
    window = transformers.MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=32)
    made["window"] = str(root / "window")
    transformers.MistralForCausalLM(window).save_pretrained(root / "window")
    save_tokenizer(root / "window", 111)
    made["mamba"] = write_config(
        root / "mamba",
        transformers.MambaConfig(vocab_size=111, hidden_size=64, num_hidden_layers=2),
        "MambaForCausalLM",
    )
    made["mixture"] = write_config(
        root / "mixture",
        transformers.MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4),
        "MixtralForCausalLM",
    )
    made["convolutions"] = write_config(
        root / "convolutions",
        transformers.Lfm2Config(
            **SIZES, num_key_value_heads=2, layer_types=["conv", "full_attention"]
        ),
        "Lfm2ForCausalLM",
    )
    made["latent"] = write_config(
        root / "latent",
        transformers.DeepseekV3Config(**SIZES, num_key_value_heads=2, n_routed_experts=4),
        "DeepseekV3ForCausalLM",
    )
    made["encoder"] = write_config(
        root / "encoder",
        transformers.BertConfig(**SIZES),
        "BertModel",
    )
    made["t5"] = write_config(
        root / "t5",
        transformers.T5Config(vocab_size=111, d_model=64, num_layers=1, num_heads=2),
        "T5ForConditionalGeneration",
    )
    return made


# What is wrong, the options that say so, and what the one line must tell.
CASES = {
    "missing base": ({"base": "no such folder"}, [], ["base", "nowhere", "no such folder"]),
    "missing expert": ({"expert": "no such folder"}, [], ["expert", "nowhere", "no such folder"]),
    "unknown hub name": ({"expert": "nobody/nothing"}, [], ["expert", "'nobody/nothing'"]),
    "no config": ({"antiexpert": "no config"}, [], ["antiexpert", "no_config", "config.json"]),
    "broken config": ({"expert": "broken config"}, [], ["expert", "broken_config", "JSON"]),
    "no weights": ({"expert": "no weights"}, [], ["expert", "no_weights", "no weights"]),
    "no weights in the base": ({"base": "no weights"}, [], ["base", "no_weights", "no weights"]),
    "weights cut short": ({"expert": "cut weights"}, [], ["expert", "model.safetensors", "short"]),
    "Git LFS pointer": ({"expert": "Git LFS pointer"}, [], ["expert", "git lfs pull"]),
    "lost shard": ({"base": "lost shard"}, [], ["base", "1 of 2", "model-2.safetensors"]),
    "lost PyTorch shard": (
        {"base": "lost PyTorch shard"},
        [],
        ["base", "1 of 2", "pytorch_model-2.bin"],
    ),
    "cut PyTorch file": ({"expert": "cut PyTorch file"}, [], ["pytorch_model.bin is cut short"]),
    "LoRA adapter": (
        {"expert": "adapter"},
        [],
        ["expert", "LoRA adapter of 'Qwen/Qwen2.5-1.5B'", "--lora-modules", "merge_and_unload"],
    ),
    "GGUF": ({"antiexpert": "gguf"}, [], ["antiexpert", "GGUF", "safetensors"]),
    "a folder too high": (
        {"expert": "folder of checkpoints"},
        [],
        ["no config.json, but one in", "run/checkpoint-50'"],
    ),
    "tools without a parser": (
        {},
        ["--enable-auto-tool-choice"],
        ["--enable-auto-tool-choice requires --tool-call-parser"],
    ),
    "unknown tool parser": (
        {},
        ["--enable-auto-tool-choice", "--tool-call-parser", "hermis"],
        ["--tool-call-parser hermis", "hermes", "--help=tool-call-parser"],
    ),
    "unknown reasoning parser": (
        {},
        ["--reasoning-parser", "qwen33"],
        ["--reasoning-parser qwen33", "qwen3", "--help=reasoning-parser"],
    ),
    "no tokenizer": ({"expert": "no tokenizer"}, [], ["tokenizer", "expert", "no_tokenizer"]),
    "unknown architecture": (
        {"antiexpert": "odd architecture"},
        [],
        ["antiexpert", "LlamaForFortuneTelling"],
    ),
    "tokenizers disagree": (
        {"antiexpert": "renamed"},
        [],
        [
            *("base and antiexpert", "3 token ids", "--allow-tokenizer-mismatch"),
            *("7: 'w7' / 'w77'", "40: 'w40' / 'forty'"),
        ],
    ),
    "short member": (
        {"expert": "short"},
        ["--max-model-len", "200"],
        ["expert", "short", "at most 128", "--max-model-len is 200", "--max-model-len 128 or less"],
    ),
    "short base": ({"base": "short"}, ["--max-model-len", "200"], ["base", "at most 128"]),
    "latent attention beside full": (
        {"antiexpert": "latent"},
        [],
        ["antiexpert", "latent'", "base", "multi-head latent attention", "blocks", "GPU"],
    ),
    "mixture under a dense base over several engines": (
        {"antiexpert": "mixture"},
        ["--data-parallel-size", "2"],
        ["antiexpert", "mixture", "base", "--data-parallel-size", "several servers"],
    ),
    "prefixes of states and own prompts": (
        {"expert": "convolutions"},
        ["--own-prompts", "--enable-prefix-caching"],
        ["--enable-prefix-caching", "expert", "convolutions", "states", "--own-prompts"],
    ),
    "states and drafts": (
        {"expert": "mamba"},
        ["--speculative-tokens", "2"],
        ["expert", "mamba", "states", "--speculative-tokens"],
    ),
    "states and prefix caching": (
        {"expert": "mamba"},
        ["--enable-prefix-caching"],
        ["--enable-prefix-caching", "expert", "mamba"],
    ),
    "own prompts and several tables": (
        {},
        ["--own-prompts", "--kv-cache-tables", "several"],
        ["--kv-cache-tables several", "one table"],
    ),
    "not generating": ({"antiexpert": "encoder"}, [], ["antiexpert", "encoder"]),
    "encoder-decoder": ({"antiexpert": "t5"}, [], ["antiexpert", "t5"]),
    "heads and tensor parallel": (
        {"expert": "three heads"},
        ["--tensor-parallel-size", "2"],
        ["expert", "three", "3 attention heads", "--tensor-parallel-size 2"],
    ),
    "adapters of a head": (
        {},
        ["--enable-lora", "--lora-target-modules", "lm_head"],
        ["--lora-target-modules names lm_head", "merge"],
    ),
    "adapters, off": ({}, ["--lora-modules", "a=/b"], ["--lora-modules needs --enable-lora"]),
    "missing adapter": (
        {},
        ["--enable-lora", "--lora-modules", "safety=/b"],
        ["adapter 'safety' (/b)", "no such folder"],
    ),
    "adapters of GPT-2": (
        {"expert": "gpt2"},
        ["--enable-lora"],
        ["--enable-lora", "GPT2LMHeadModel", "merge"],
    ),
    "adapters and own prompts": (
        {},
        ["--enable-lora", "--own-prompts"],
        ["--enable-lora", "--own-prompts", "another order"],
    ),
    "microbatches": ({}, ["--ubatch-size", "2"], ["ubatch_size", "microbatches"]),
    "drafts from hidden states": (
        {},
        ["--speculative-config", '{"method": "eagle", "model": "e", "num_speculative_tokens": 2}'],
        ["'eagle'", "hidden states", "ngram"],
    ),
    "a file": ({"expert": "weight file"}, [], ["expert", "model.safetensors", "is a file"]),
    "no weights, no tokenizer": ({"expert": "config alone"}, [], ["expert", "no weights"]),
    "unknown quantization": (
        {"expert": "odd quantization"},
        [],
        ["expert", "odd_quantization", "frobnicate"],
    ),
    "another task": ({}, ["--runner", "pooling"], ["runner='pooling'"]),
    "negative length": ({}, ["--max-model-len", "-5"], ["--max-model-len is -5", "at least 1"]),
    "missing options file": ({}, ["--config", "nowhere.yaml"], ["nowhere.yaml", "No such file"]),
    "unknown load format": ({}, ["--load-format", "gguf"], ["--load-format gguf", "safetensors"]),
    "missing key file": ({}, ["--ssl-keyfile", "/no.pem"], ["--ssl-keyfile /no.pem", "no such"]),
    "key without certificate": ({}, ["--ssl-keyfile", __file__], ["needs --ssl-certfile"]),
    "own worker": ({}, ["--worker-cls", "some.Worker"], ["worker_cls", "some.Worker"]),
    "alpha nan": ({}, ["--alpha", "nan"], ["alpha", "'nan'", "finite"]),
    "alpha inf": ({}, ["--alpha=-inf"], ["alpha", "'-inf'", "finite"]),
    "alpha word": ({}, ["--alpha", "strong"], ["alpha", "'strong'", "number"]),
    "alpha out of range": ({}, ["--alpha", "11"], ["alpha is 11", "-10 .. 10", "--alpha-range"]),
    "alpha range": ({}, ["--alpha-range", "2", "1"], ["alpha range 2.0 .. 1.0"]),
    "unknown member setting": (
        {},
        ["--expert-args", '{"dtpye": "float32"}'],
        ["expert", "dtpye"],
    ),
    "unknown dtype of a member": (
        {},
        ["--antiexpert-args", '{"dtype": "float33"}'],
        ["antiexpert", "float33"],
    ),
    "no drafts": ({}, ["--speculative-tokens", "-1"], ["--speculative-tokens is -1"]),
    "too many drafts": ({}, ["--speculative-tokens", "99"], ["is 99", "from 1 to 16", "auto"]),
    "drafts over a pipeline": (
        {},
        ["--speculative-tokens", "2", "--pipeline-parallel-size", "2"],
        ["--speculative-tokens", "--pipeline-parallel-size 2", "cannot draft"],
    ),
    "two ways to speculate": (
        {},
        ["--speculative-tokens", "2", "--speculative-config", '{"method": "ngram"}'],
        ["--speculative-tokens and --speculative-config"],
    ),
}


def argv(folders: dict[str, str], members: dict[str, str], options: list[str]) -> list[str]:
    names = {"base": "base", "expert": "expert", "antiexpert": "antiexpert", **members}
    base, expert, antiexpert = (folders.get(name, name) for name in names.values())
    return [
        *("serve", base, "--expert", expert, "--antiexpert", antiexpert),
        *("--dtype", "float32", *options),
    ]


def refused(arguments: list[str], capfd) -> str:
    """Run a command that must be refused, and return its one line."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    captured = capfd.readouterr()
    assert exit.value.code == 2, captured.err
    assert "Traceback" not in captured.err + captured.out
    errors = re.findall(r"^proxy-vllm: error: (.*)$", captured.err, re.MULTILINE)
    assert len(errors) == 1, captured.err
    assert captured.err.rstrip().endswith(errors[0]), "something follows the one line"
    return errors[0]


@pytest.mark.parametrize("name", CASES)
def test_refused_with_one_line(name, folders, capfd):
    members, options, tells = CASES[name]
    line = refused(argv(folders, members, options), capfd)
    print(name, "=>", line)
    assert len(line) < 600
    for part in tells:
        assert part in line


PASSING = {
    "the good trio": ({}, []),
    "tokenizers disagree, allowed": ({"antiexpert": "renamed"}, ["--allow-tokenizer-mismatch"]),
    "short member, no length asked": ({"expert": "short"}, []),
    "short member, its length asked": ({"expert": "short"}, ["--max-model-len", "128"]),
    "a window": ({"expert": "window"}, []),
    "window cut off": ({"expert": "window"}, ["--disable-sliding-window"]),
    "more tokens in the expert": ({"expert": "128 tokens"}, []),
    "no weights, none loaded": ({"expert": "no weights"}, ["--load-format", "dummy"]),
    "two heads in two shards": (
        {"expert": "base", "antiexpert": "base"},
        ["--tensor-parallel-size", "2"],
    ),
}


@pytest.mark.parametrize("name", PASSING)
def test_not_refused(name, folders):
    """The checks above refuse what they name and nothing beside it."""
    with pytest.raises(Started):
        main(argv(folders, *PASSING[name]))


def test_failures_of_the_server_itself_are_one_line(folders, capfd, monkeypatch):
    """A port that is taken, and an engine process that has logged why it ended."""
    from vllm.entrypoints.cli.serve import ServeSubcommand

    for error, tells in (
        (OSError(errno.EADDRINUSE, "Address already in use"), "--port 8000 is in use"),
        (RuntimeError("Engine core initialization failed. See above."), "did not start"),
    ):

        def start(args, error=error):
            raise error

        monkeypatch.setattr(ServeSubcommand, "cmd", staticmethod(start))
        assert tells in refused(argv(folders, {}, []), capfd)


def test_wrong_vllm_version(folders, capfd, monkeypatch):
    import vllm

    monkeypatch.setattr(vllm, "__version__", "0.31.1+cpu")
    line = refused(argv(folders, {}, []), capfd)
    for part in ("0.31.1+cpu", "0.32.0", "pip install"):
        assert part in line


def test_one_model_as_expert_and_antiexpert_is_said(folders, capfd):
    """It is a way to the base alone, so it runs, but not in silence."""
    import logging

    from proxy_vllm.config import ProxyConfig
    from proxy_vllm.validate import warn_of_no_steering

    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    logger = logging.getLogger("vllm.proxy_vllm.validate")
    logger.addHandler(handler)
    try:
        warn_of_no_steering(ProxyConfig(folders["expert"], folders["antiexpert"]))
        assert not told
        same = folders["expert"] + "/../expert"
        warn_of_no_steering(ProxyConfig(folders["expert"], same))
        assert len(told) == 1 and "the same model" in told[0]
        other = {"revision": "other"}
        warn_of_no_steering(ProxyConfig(folders["expert"], folders["expert"], expert_args=other))
        assert len(told) == 1
    finally:
        logger.removeHandler(handler)


PLAN = [sys.executable, "-m", "proxy_vllm.cli.main", "plan"]


def test_plan_needs_no_known_runner(folders):
    env = {**os.environ, "PROXY_VLLM_CPU_RUNNER": "foo"}
    arguments = [folders["base"], "--expert", folders["expert"], "--antiexpert", folders["expert"]]
    arguments += ["--gpu", "h200"]
    done = subprocess.run([*PLAN, *arguments], env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr


def test_a_reader_that_stops_reading_is_no_error(folders):
    arguments = [folders["base"], "--expert", folders["expert"], "--antiexpert", folders["expert"]]
    arguments += ["--gpu", "h200"]
    process = subprocess.Popen(
        [*PLAN, *arguments, "--json", "-"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()  # before anything is written
    assert process.stderr.read() == b""
    assert process.wait(60) == 141


def test_unknown_runner(folders, capfd, monkeypatch):
    monkeypatch.setenv("PROXY_VLLM_CPU_RUNNER", "v3")
    assert "PROXY_VLLM_CPU_RUNNER='v3'" in refused(argv(folders, {}, []), capfd)


def test_members_must_be_named(folders, capfd):
    with pytest.raises(SystemExit) as exit:
        main(["serve", folders["base"], "--expert", folders["expert"]])
    assert exit.value.code == 2
    assert "--antiexpert" in capfd.readouterr().err


def test_python_api_raises_user_errors(folders):
    from proxy_vllm import ProxyLLM

    good = {role: folders[role] for role in ("expert", "antiexpert")}
    for changes, tells in (
        ({"expert": folders["no weights"]}, "no weights"),
        ({"antiexpert": folders["renamed"]}, "disagree on 3 token ids"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"lora_modules": {"safety": "/b"}}, "--enable-lora"),
        ({"enable_lora": True, "lora_modules": {"safety": "/b"}}, "'safety' .*no such folder"),
        ({"expert": folders["short"], "max_model_len": 129}, "at most 128"),
        ({"expert": ""}, "expert"),
        ({"hf_overrides": lambda config: config}, "hf_overrides"),
    ):
        with pytest.raises(UserError, match=tells) as error:
            ProxyLLM(model=folders["base"], **{**good, "dtype": "float32", **changes})
        assert "\n" not in str(error.value)
