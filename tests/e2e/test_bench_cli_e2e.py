"""vLLM's benchmarks through `proxy-vllm bench`.

Latency and throughput run real engines with a tiny random trio. The client of `bench serve` meets
a server whose delays are known, so that its metrics have something to be held against.
"""

import gc
import http.server
import json
import threading
import time
from typing import ClassVar

import pytest
from tiny_models import make_model

from proxy_vllm.cli.main import main

# vLLM's latency benchmark draws token ids up to 10000.
VOCAB = 10_048
ENGINE = "--dtype float32 --max-model-len 64 --enforce-eager --block-size 32 --max-num-seqs 4"


@pytest.fixture(scope="module")
def trio(tmp_path_factory):
    root = tmp_path_factory.mktemp("bench")
    small = {"vocab": VOCAB, "hidden": 32, "heads": 1, "layers": 1}
    base = make_model(root / "base", seed=1, vocab=VOCAB)
    expert = make_model(root / "expert", seed=2, **small)
    antiexpert = make_model(root / "antiexpert", seed=3, **small)
    engine = [*ENGINE.split(), "--kv-cache-memory-bytes", str(8 << 20)]
    return [base, "--expert", expert, "--antiexpert", antiexpert, *engine]


@pytest.fixture
def steps(monkeypatch):
    """Token table's shape and layers of each member, and alpha, at each step of the composite."""
    from vllm.distributed import cleanup_dist_env_and_memory

    from proxy_vllm.composite.model import ProxyTunedForCausalLM

    seen = []
    forward = ProxyTunedForCausalLM.forward

    def record(self, *args, **kwargs):
        llamas = [member.model for member in self.members()]
        members = tuple((*m.embed_tokens.weight.shape, len(m.layers)) for m in llamas)
        seen.append((members, self.proxy_config.alpha))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(ProxyTunedForCausalLM, "forward", record)
    yield seen
    gc.collect()
    cleanup_dist_env_and_memory()


def assert_composite_ran(seen, at_least, alpha):
    assert len(seen) >= at_least
    base, small = (VOCAB, 64, 2), (VOCAB, 32, 1)
    assert set(seen) == {((base, small, small), alpha)}


def test_latency(trio, steps, tmp_path):
    out = tmp_path / "latency.json"
    load = "--input-len 6 --output-len 5 --batch-size 2 --num-iters-warmup 1 --num-iters 3"
    main(["bench", "latency", *trio, *load.split(), "--output-json", str(out)])
    result = json.loads(out.read_text())
    assert len(result["latencies"]) == 3
    assert min(result["latencies"]) > 0
    assert result["avg_latency"] == pytest.approx(sum(result["latencies"]) / 3)
    assert set(result["percentiles"]) == {"10", "25", "50", "75", "90", "99"}
    assert result["proxy"]["expert"] == trio[2]
    # Four runs of at least one prefill and four decode steps.
    assert_composite_ran(steps, 4 * 5, alpha=1.0)


def test_throughput(trio, steps, tmp_path):
    out = tmp_path / "throughput.json"
    load = "--dataset-name random --random-input-len 6 --random-output-len 5 --num-prompts 4"
    argv = [*trio, "--alpha", "0.5", *load.split(), "--output-json", str(out)]
    main(["bench", "throughput", *argv])
    result = json.loads(out.read_text())
    assert result["num_requests"] == 4
    assert result["total_num_tokens"] == 4 * (6 + 5)
    assert result["elapsed_time"] > 0
    assert result["requests_per_second"] == pytest.approx(4 / result["elapsed_time"])
    assert result["tokens_per_second"] == pytest.approx(44 / result["elapsed_time"])
    assert result["proxy"]["alpha"] == 0.5
    assert_composite_ran(steps, 5, alpha=0.5)


class SlowCompletions(http.server.BaseHTTPRequestHandler):
    """Streams as many tokens as asked for: the first after FIRST seconds, the rest after EACH."""

    FIRST, EACH = 0.2, 0.05
    bodies: ClassVar[list[dict]] = []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/v1/completions":
            self.send_error(404)
            return
        self.bodies.append(body)
        if body["vllm_xargs"]["proxy_alpha"] > 10:
            self.send_error(400)
            return
        self.send_response(200)
        self.end_headers()
        for i in range(body["max_tokens"]):
            time.sleep(self.EACH if i else self.FIRST)
            self._send({"choices": [{"text": "w7 "}]})
        usage = {"completion_tokens": body["max_tokens"], "prompt_tokens": 6}
        self._send({"choices": [], "usage": usage})

    def _send(self, event):
        self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
        self.wfile.flush()

    def log_message(self, *args):
        pass


@pytest.fixture
def slow_server():
    SlowCompletions.bodies.clear()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), SlowCompletions) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield ["--host", "127.0.0.1", "--port", str(server.server_port)]
        server.shutdown()
    gc.unfreeze()  # vLLM's client freezes the heap that it found


LOAD = "--dataset-name random --random-input-len 6 --random-output-len 5 --num-prompts 4"


def test_serve_client(trio, slow_server, tmp_path):
    saved = ["--save-result", "--result-dir", str(tmp_path), "--result-filename", "serve.json"]
    argv = [trio[0], "--alpha", "0.5", "--expert", trio[2], *slow_server, *LOAD.split(), *saved]
    main(["bench", "serve", *argv])
    assert [body["vllm_xargs"] for body in SlowCompletions.bodies] == [{"proxy_alpha": 0.5}] * 4
    result = json.loads((tmp_path / "serve.json").read_text())
    assert (result["completed"], result["failed"]) == (4, 0)
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (24, 20)
    assert result["expert"] == trio[2]
    # Sleeps are lower bounds; above them only what a busy machine adds.
    assert 200 <= result["mean_ttft_ms"] < 1500
    assert 50 <= result["mean_tpot_ms"] < 375
    assert result["output_throughput"] == pytest.approx(20 / result["duration"])


def test_serve_client_fails_when_every_request_does(trio, slow_server, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["bench", "serve", trio[0], "--alpha", "99", *slow_server, *LOAD.split()])
    assert stop.value.code == 2
    assert "error: none of 4 requests succeeded" in capsys.readouterr().err
