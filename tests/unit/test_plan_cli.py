"""`proxy-vllm plan` from folders that hold nothing but a config.json."""

import argparse
import http.server
import json
import os
import subprocess
import sys
import threading
from typing import ClassVar

import pytest

from proxy_vllm.cli.plan import PlanSubcommand, cmd_init
from proxy_vllm.errors import UserError

BASE = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
    "max_position_embeddings": 131072,
}
SMALL = BASE | {
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "head_dim": 64,
    "intermediate_size": 8192,
    "tie_word_embeddings": True,
    "max_position_embeddings": 2048,
}


@pytest.fixture
def trio(tmp_path):
    """Arguments naming three folders with a config.json each, and no weights."""
    for name, config in (("base", BASE), ("expert", SMALL), ("antiexpert", SMALL)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    folder = {name: str(tmp_path / name) for name in ("base", "expert", "antiexpert")}
    return [folder["base"], "--expert", folder["expert"], "--antiexpert", folder["antiexpert"]]


def run(*argv):
    parser = argparse.ArgumentParser(prog="proxy-vllm")
    subparsers = parser.add_subparsers()
    for command in cmd_init():
        command.subparser_init(subparsers).set_defaults(dispatch_function=command.cmd)
    args = parser.parse_args(["plan", *argv])
    PlanSubcommand().validate(args)
    args.dispatch_function(args)


def test_table_and_json_tell_the_design_figures(trio, tmp_path, capsys):
    out = tmp_path / "plan.json"
    run(*trio, "--gpu", "h200", "--tp", "1", "--batch", "64", "--json", str(out))
    result = json.loads(out.read_text())
    assert result["step_ms"] == pytest.approx(7.65, rel=4e-3)
    assert result["base_step_ms"] == pytest.approx(5.49, rel=4e-3)
    assert result["ratio"] == pytest.approx(5.49 / 7.65, rel=8e-3)
    assert result["fits"] is True
    # Published parameters, 16 bits: 8030261248 and 1235814400.
    assert result["weights_gib"]["base"] == pytest.approx(8030261248 * 2 / 2**30)
    assert result["weights_gib"]["expert"] == pytest.approx(1235814400 * 2 / 2**30)
    # 139.8 * 0.9 - 2 GiB less the weights, over 131072 + 2 * 32768 bytes.
    weights = (8030261248 + 2 * 1235814400) * 2
    assert result["kv_tokens"] == int(((139.8 * 0.9 - 2) * 2**30 - weights) // 196608)
    assert result["tokens_per_s"] == pytest.approx(64 / result["step_ms"] * 1e3)

    text = capsys.readouterr().out
    for shown in ("14.96", "2.30", "7.65 ms", "5.49 ms", "1.39x", "8,368", "569,391", "fits: yes"):
        assert shown in text


def test_json_to_stdout_is_nothing_but_json(trio, capsys):
    run(*trio, "--gpu", "l4", "--json", "-")
    result = json.loads(capsys.readouterr().out)
    assert result["fits"] is False
    assert result["kv_tokens"] == 0


def test_not_fitting_says_what_is_short(trio, capsys):
    run(*trio, "--gpu", "l4")
    assert (
        "fits: no (weights take 19.6 GiB of each GPU, 17.8 GiB is there" in capsys.readouterr().out
    )
    run(*trio, "--gpu", "h200", "--batch", "1000")
    assert "fits: no (the KV cache holds 569,391 tokens, 1,024,000" in capsys.readouterr().out


def test_own_figures_replace_a_gpu(trio, capsys):
    figures = ["--bandwidth-tbps", "4.3", "--tflops", "790", "--memory-gib", "139.8"]
    run(*trio, *figures, "--json", "-")
    own = json.loads(capsys.readouterr().out)
    run(*trio, "--gpu", "h200", "--json", "-")
    named = json.loads(capsys.readouterr().out)
    assert own["step_ms"] == named["step_ms"]
    assert own["kv_tokens"] == named["kv_tokens"]


def test_context_past_a_member_is_noted(trio, capsys):
    run(*trio, "--gpu", "h200", "--context", "4096")
    out = capsys.readouterr().out
    assert "note: expert: has 2048 positions, context is 4096" in out
    assert "note: base:" not in out


def one_line_error(*argv):
    with pytest.raises(UserError) as error:
        run(*argv)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_bad_input_names_the_culprit(trio, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    message = one_line_error(*trio, "--gpu", "voodoo2")
    assert "voodoo2" in message
    assert "--bandwidth-tbps" in message
    missing = str(tmp_path / "nowhere")
    assert missing in one_line_error(missing, *trio[1:], "--gpu", "h200")
    (tmp_path / "empty").mkdir()
    assert "no config.json" in one_line_error(str(tmp_path / "empty"), *trio[1:], "--gpu", "h200")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text('{"hidden_size": 4096,')
    assert str(broken) in one_line_error(str(broken), *trio[1:], "--gpu", "h200")
    (broken / "config.json").write_bytes(b"\xff\xfe\x00")
    assert str(broken) in one_line_error(str(broken), *trio[1:], "--gpu", "h200")
    unwritable = str(tmp_path / "no" / "folder.json")
    assert unwritable in one_line_error(*trio, "--gpu", "h200", "--json", unwritable)


@pytest.mark.parametrize(
    "field, value",
    [
        ("num_hidden_layers", 10**30),
        ("hidden_size", 7),
        ("vocab_size", "many"),
        ("num_key_value_heads", 0),
        ("head_dim", "wide"),
        ("quantization_config", "fp8"),
        ("quantization_config", {"quant_method": "compressed-tensors", "config_groups": 3}),
    ],
)
def test_an_odd_field_of_a_config_is_named(trio, tmp_path, field, value):
    config = {**BASE, field: value}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    message = one_line_error(*trio, "--gpu", "h200")
    assert trio[0] in message
    shown = {"num_hidden_layers": "layers", "hidden_size": "hidden size"}
    shown["num_key_value_heads"] = "cannot build a llama of this config.json"
    assert shown.get(field, field) in message


def test_a_hub_name_that_cannot_be_had_is_one_line(trio, monkeypatch):
    """The hub client is told to stay offline, so nothing is asked of any network."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message = one_line_error("nobody/no-such-model", *trio[1:], "--gpu", "h200")
    assert "nobody/no-such-model" in message
    assert "local model folder" in message


RUN = """
import argparse, sys
from proxy_vllm.cli.plan import cmd_init
subparsers = (parser := argparse.ArgumentParser()).add_subparsers()
for command in cmd_init():
    command.subparser_init(subparsers).set_defaults(run=command.cmd)
args = parser.parse_args(sys.argv[1:])
args.run(args)
assert "vllm" not in sys.modules
"""


def test_vllm_is_not_imported(trio):
    """A plan is for before the installation too."""
    argv = [sys.executable, "-c", RUN, "plan", *trio, "--gpu", "h200"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "fits: yes" in done.stdout


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub's protocol as one small file takes; `asked` lists what was wanted."""

    asked: ClassVar[list[str]] = []

    def do_HEAD(self):
        self.asked.append(self.path)
        body = json.dumps(BASE).encode()
        self.send_response(200 if self.path == "/big/model/resolve/main/config.json" else 404)
        self.send_header("ETag", '"0123456789"')
        self.send_header("X-Repo-Commit", "a" * 40)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_GET = do_HEAD

    def log_message(self, *args):
        pass


def test_of_a_hub_model_only_config_json_is_fetched(trio, tmp_path):
    Hub.asked.clear()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        env |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "NO_PROXY": "127.0.0.1"}
        env |= {"HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_DISABLE_TELEMETRY": "1"}
        argv = [sys.executable, "-c", RUN, "plan", "big/model", *trio[1:], "--gpu", "h200"]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60, env=env)
        missing = subprocess.run(
            [*argv[:4], "small/model", *argv[5:]],
            capture_output=True,
            text=True,
            timeout=60,
            env=env,
        )
        server.shutdown()
    assert done.returncode == 0, done.stderr
    assert "14.96" in done.stdout
    assert {path.rsplit("/", 1)[1] for path in Hub.asked} == {"config.json"}
    assert "UserError: small/model: no such folder here, and the hub gave no" in missing.stderr


def test_through_the_command_a_fault_is_one_line_and_status_2(trio, tmp_path, capsys):
    from proxy_vllm.cli.main import main

    out = tmp_path / "plan.json"
    main(["plan", *trio, "--gpu", "h200", "--json", str(out)])
    assert json.loads(out.read_text())["step_ms"] == pytest.approx(4.69, rel=4e-3)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["plan", *trio, "--gpu", "voodoo2"])
    assert stop.value.code == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert len(err) == 1
    assert err[0].startswith("proxy-vllm: error: unknown GPU 'voodoo2'")


ELSEWHERE = ["--base-url", "https://host/v1", "--base-model", "big"]


def test_a_base_elsewhere_is_the_pair_here_and_trips(trio, tmp_path, capsys):
    """Hand counts: 1235814400 parameters a member, 16 bits; nothing is asked of the endpoint."""
    pair, out = trio[1:], tmp_path / "plan.json"
    way = ["--base-latency-ms", "50", "--tokens-a-trip", "2.5", "--questions-a-token", "0.1"]
    run(*ELSEWHERE, *pair, "--gpu", "h200", *way, "--price", "2,8,0.2", "--json", str(out))
    result = json.loads(out.read_text())
    weights = 2 * 1235814400 * 2
    assert result["weights_gib"]["total"] == pytest.approx(weights / 2**30)
    assert "base" not in result["weights_gib"]
    # 139.8 * 0.9 - 2 GiB less the weights, over 2 * 32768 bytes.
    assert result["kv_tokens"] == int(((139.8 * 0.9 - 2) * 2**30 - weights) // 65536)
    # Both are read once a step, and little else: two rows of eight tokens.
    floor = weights / 4.3e12 * 1e3
    assert floor < result["step_ms"] < 1.1 * floor
    assert result["token_ms"] == pytest.approx(result["step_ms"] + 50 * (1 / 2.5 + 0.1))
    assert result["tokens_per_s"] == pytest.approx(1e3 / result["token_ms"])
    # A trip of 1024 cached tokens and 3.5 written ones, and a question of one, for 2.5 tokens.
    trip, question = 1024 * 0.2 + 3.5 * 8, 1024 * 0.2 + 8
    assert result["dollars_per_1000_tokens"] == pytest.approx((trip / 2.5 + 0.1 * question) / 1000)
    shown = capsys.readouterr().out
    for part in ("base: big, exact", "fits: yes", "its endpoint was not asked", "dollars"):
        assert part in shown

    run(*ELSEWHERE, *pair, "--gpu", "h200", *way, "--base-mode", "top-k", "--json", "-")
    cheaper = json.loads(capsys.readouterr().out)
    assert cheaper["token_ms"] == pytest.approx(cheaper["step_ms"] + 50 / 2.5)
    assert cheaper["dollars_per_1000_tokens"] is None
    run(*ELSEWHERE, *pair, "--gpu", "h200", *way, "--batch", "64", "--json", "-")
    many = json.loads(capsys.readouterr().out)
    assert many["tokens_per_s"] == pytest.approx(32 / many["token_ms"] * 1e3)
    assert "32 conversations ask at once (--base-concurrency)" in many["notes"]


def test_what_does_not_go_with_a_base_elsewhere(trio):
    pair = trio[1:]
    assert "give one of them" in one_line_error(*trio, *ELSEWHERE, "--gpu", "h200")
    assert "BASE is missing" in one_line_error(*pair, "--gpu", "h200")
    assert "--base-model" in one_line_error(*pair, *ELSEWHERE[:2], "--gpu", "h200")
    assert "--base-url" in one_line_error(*trio, "--tokens-a-trip", "2", "--gpu", "h200")
    drafts = ["--speculative-tokens", "4", "--acceptance", "0.7"]
    assert "--base-drafts" in one_line_error(*pair, *ELSEWHERE, *drafts, "--gpu", "h200")
    message = one_line_error(*pair, *ELSEWHERE, "--tokens-a-trip", "0.5", "--gpu", "h200")
    assert message == "--tokens-a-trip 0.5: give a number from 1"


def test_adapters_share_the_small_models_weights(trio, capsys):
    """Two slots of rank 16: inputs and outputs of each layer and of the token table, counted."""
    base, _, _, *antiexpert = trio
    run(*trio, "--gpu", "h200", "--json", "-")
    plain = json.loads(capsys.readouterr().out)
    run(base, *antiexpert, "--enable-lora", "--max-loras", "2", "--gpu", "h200", "--json", "-")
    shared = json.loads(capsys.readouterr().out)
    layer = 2 * (2048 + 2048) + 2 * (2048 + 512) + 3 * (2048 + 8192)
    slots = 2 * 16 * 2 * (16 * layer + 128256 + 2048) / 2**30
    weights = shared["weights_gib"]
    assert weights["adapters"] == pytest.approx(slots)
    assert weights["expert"] == 0
    assert weights["total"] == pytest.approx(
        plain["weights_gib"]["total"] - plain["weights_gib"]["expert"] + slots
    )
    assert shared["kv_tokens"] > plain["kv_tokens"]
    assert shared["step_ms"] == plain["step_ms"]
    with pytest.raises(UserError, match="--expert is missing"):
        run(base, *antiexpert, "--gpu", "h200")
    with pytest.raises(UserError, match="--max-lora-rank 7"):
        run(base, *antiexpert, "--gpu", "h200", "--enable-lora", "--max-lora-rank", "7")
