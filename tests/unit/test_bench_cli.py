"""`proxy-vllm bench`: what reaches vLLM's benchmark modules. They are replaced by a recorder."""

import gc
import json
import re
import socket

import pytest
from tiny_models import make_model
from vllm.benchmarks import serve
from vllm.entrypoints.cli.benchmark import latency, throughput

from proxy_vllm.cli.main import main

VOCAB = 10_007


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("bench")
    small = {"vocab": VOCAB, "hidden": 32, "heads": 1, "layers": 1}
    return {
        "base": make_model(root / "base", seed=1, vocab=VOCAB),
        "expert": make_model(root / "expert", seed=2, **small),
        "antiexpert": make_model(root / "antiexpert", seed=3, **small),
        "small_vocabulary": make_model(root / "few", seed=1),
    }


@pytest.fixture
def measured(monkeypatch):
    """Namespaces that reached vLLM's own `main`, by benchmark; a result is written as vLLM does."""
    seen = {}

    def recorder(kind):
        def record(args):
            seen[kind] = args
            if getattr(args, "output_json", None):
                with open(args.output_json, "w") as file:
                    json.dump({"model_id": args.model, "elapsed_time": 1.5}, file)
            return {"completed": 1}

        return record

    for module in (latency, throughput, serve):
        kind = module.__name__.rsplit(".", 1)[1]
        monkeypatch.setattr(module, "main", recorder(kind))
    return seen


def offline(kind, folders, *more, base="base"):
    trio = ["--expert", folders["expert"], "--antiexpert", folders["antiexpert"]]
    main(["bench", kind, folders[base], *trio, *more])


def error_line(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        main(["bench", *argv])
    assert stop.value.code == 2
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("proxy-vllm: error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("kind", ["latency", "throughput"])
def test_engine_arguments_are_those_of_the_trio(kind, folders, measured, tmp_path):
    from vllm import EngineArgs

    out = tmp_path / "result.json"
    length = ["--max-model-len", "200", "--input-len", "8", "--output_len=9", "--seed", "7"]
    offline(kind, folders, "--alpha", "0.25", *length, "--output-json", str(out))
    args = measured[kind]
    # What vLLM's benchmark builds its engine from.
    engine = EngineArgs.from_cli_args(args)
    assert engine.model == folders["base"]
    assert engine.hf_overrides == {"architectures": ["ProxyTunedForCausalLM"]}
    assert engine.worker_cls.startswith("proxy_vllm.")
    trio = engine.additional_config["proxy_vllm"]
    assert (trio["expert"], trio["antiexpert"]) == (folders["expert"], folders["antiexpert"])
    assert trio["alpha"] == 0.25
    # vLLM's own options are as asked for, the benchmark's defaults among them.
    assert (engine.max_model_len, engine.seed) == (200, 7)
    assert (args.input_len, args.output_len) == (8, 9)
    assert engine.enable_prefix_caching == (False if kind == "latency" else None)

    result = json.loads(out.read_text())
    assert (result["model_id"], result["elapsed_time"]) == (folders["base"], 1.5)
    # The result records what was asked for; the engine's tokens were found at start-up.
    assert {**result["proxy"], "named_tokens": trio["named_tokens"]} == trio


def test_model_option_is_as_good_as_the_positional(folders, measured):
    trio = ["--expert", folders["expert"], "--antiexpert", folders["antiexpert"]]
    main(["bench", "throughput", "--model", folders["base"], *trio, "--input-len", "4"])
    assert measured["throughput"].model == folders["base"]


def test_serve_is_a_client_with_alpha_in_every_request(measured):
    main(["bench", "serve", "some/base", "--port", "1234", "--dataset-name", "random"])
    plain = measured["serve"]
    assert (plain.model, plain.port, plain.dataset_name) == ("some/base", 1234, "random")
    assert (plain.extra_body, plain.metadata) == (None, None)

    body = '{"vllm_xargs": {"other": 1}, "min_tokens": 3}'
    trio = ["--alpha", "0.5", "--expert", "e", "--antiexpert", "a"]
    main(["bench", "serve", *trio, "--extra-body", body, "--metadata", "run=3"])
    args = measured["serve"]
    # Without a model vLLM asks the server for the one that it serves.
    assert args.model is None
    assert args.extra_body == {"vllm_xargs": {"other": 1, "proxy_alpha": 0.5}, "min_tokens": 3}
    assert args.metadata == ["run=3", "expert=e", "antiexpert=a", "alpha=0.5"]


def test_bad_input_is_one_line(folders, measured, capsys, tmp_path):
    trio = ["--expert", folders["expert"], "--antiexpert", folders["antiexpert"]]
    assert "a base model is needed" in error_line(capsys, "latency", *trio)

    missing = str(tmp_path / "nowhere")
    wrong = ["--expert", missing, "--antiexpert", folders["antiexpert"]]
    assert missing in error_line(capsys, "throughput", folders["base"], *wrong, "--input-len", "4")

    hf = ["--backend", "hf", "--hf-max-batch-size", "1"]
    assert "--backend hf" in error_line(capsys, "throughput", folders["base"], *trio, *hf)

    out = ["--output-json", str(tmp_path / "no" / "result.json")]
    assert out[1] in error_line(capsys, "latency", folders["base"], *trio, *out)

    few = ["--allow-tokenizer-mismatch"]
    line = error_line(capsys, "latency", folders["small_vocabulary"], *trio, *few)
    assert re.search(r"has 111 vocabulary entries.*bench throughput", line)

    long = ["--max-model-len", "64", "--input-len", "60", "--output-len", "10"]
    line = error_line(capsys, "latency", folders["base"], *trio, *long)
    assert "70 tokens, more than the model length of 64" in line

    assert "--alpha is nan" in error_line(capsys, "serve", "--alpha", "nan")

    for kind, option, value in (
        ("latency", "--batch-size", "-1"),
        ("latency", "--num-iters", "0"),
        ("throughput", "--num-prompts", "0"),
    ):
        line = error_line(capsys, kind, folders["base"], *trio, option, value)
        assert f"{option} {value}: give a whole number from 1" in line
    assert "--num-prompts -2" in error_line(capsys, "serve", "some/base", "--num-prompts", "-2")
    assert "--request-rate -1" in error_line(capsys, "serve", "b", "--request-rate", "-1")
    assert measured == {}


def test_a_server_that_refuses_every_request_is_a_failure(measured, monkeypatch, capsys):
    monkeypatch.setattr(serve, "main", lambda args: {"completed": 0, "failed": 5})
    line = error_line(capsys, "serve", "some/base", "--num-prompts", "5")
    assert "none of 5 requests succeeded" in line


def test_an_unreachable_server_is_one_short_line(folders, capsys):
    with socket.socket() as taken:
        # Bound and not listening: nothing answers there, and nobody else can take it.
        taken.bind(("127.0.0.1", 0))
        port = str(taken.getsockname()[1])
        where = ["--host", "127.0.0.1", "--port", port, "--ready-check-timeout-sec", "1"]
        load = ["--dataset-name", "random", "--num-prompts", "1", "--random-input-len", "4"]
        line = error_line(capsys, "serve", folders["base"], *where, *load)
    gc.unfreeze()  # vLLM's client freezes the heap that it found
    assert port in line
    assert "Traceback" not in line
    assert len(line) < 300


def test_what_the_benchmark_cannot_read_is_one_line(folders, capsys, tmp_path):
    missing = str(tmp_path / "nowhere.json")
    load = ["--dataset-name", "sharegpt", "--num-prompts", "1", "--dataset-path", missing]
    trio = ["--expert", folders["expert"], "--antiexpert", folders["antiexpert"]]
    line = error_line(capsys, "throughput", folders["base"], *trio, *load)
    assert line.endswith(f"{missing}: No such file or directory")
    load = ["--dataset-name", "random", "--num-prompts", "1", "--port", "1"]
    line = error_line(capsys, "serve", str(tmp_path / "no/model"), *load)
    assert str(tmp_path / "no/model") in line
    # Without a model's name the server is asked for it, and there is none.
    assert "127.0.0.1:1" in error_line(capsys, "serve", *load)


def test_refusals_of_the_benchmark_itself_are_one_line(folders, measured, monkeypatch, capsys):
    def refuse(args):
        raise AssertionError("Please ensure that\n max_model_len is greater")

    monkeypatch.setattr(throughput, "main", refuse)
    trio = ["--expert", folders["expert"], "--antiexpert", folders["antiexpert"]]
    line = error_line(capsys, "throughput", folders["base"], *trio, "--input-len", "4")
    assert line.endswith("Please ensure that max_model_len is greater")
