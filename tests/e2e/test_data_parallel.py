"""Two data-parallel engines behind one server: each asked by its rank, against the loop."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request

import pytest
import torch
from engines import free_port, prompt_ids
from reference_loop import Trio, greedy

pytestmark = pytest.mark.slow

if os.environ.get("PROXY_VLLM_CPU_RUNNER") == "v2":
    pytest.skip("data parallel lies above the runner: once is enough", allow_module_level=True)

START_SECONDS = 800


class Server:
    def __init__(self, trio, log_path) -> None:
        port = free_port()
        self.url, self.log_path = f"http://127.0.0.1:{port}", log_path
        cores = sorted(os.sched_getaffinity(0))
        # One engine a core; both on the only core of a smaller machine.
        env = {
            **os.environ,
            "VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}|{cores[-1]}",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        }
        command = [
            *(sys.executable, "-m", "proxy_vllm.cli.main", "serve", trio["model"]),
            *("--expert", trio["expert"], "--antiexpert", trio["antiexpert"], "--alpha", "1.5"),
            *("--host", "127.0.0.1", "--port", str(port), "--served-model-name", "steered"),
            *("--dtype", "float32", "--enforce-eager", "--max-model-len", "256"),
            *("--kv-cache-memory-bytes", str(32 << 20), "--block-size", "32"),
            *("--data-parallel-size", "2", "--api-server-count", "1"),
        ]
        with open(log_path, "w") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=env, start_new_session=True
            )

    def wait(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                if urllib.request.urlopen(self.url + "/health", timeout=5).status == 200:
                    return
            except OSError:
                pass
            if self.process.poll() is not None or time.monotonic() > deadline:
                log = self.log_path.read_text()[-3000:]
                pytest.fail(f"the server did not come up:\n{log}")
            time.sleep(0.5)

    def complete(self, prompt, *, rank=None, **body) -> list[int]:
        body = {
            "model": "steered", "prompt": prompt, "max_tokens": 8, "temperature": 0,
            "ignore_eos": True, "return_token_ids": True, **body,
        }  # fmt: skip
        headers = {"Content-Type": "application/json"}
        if rank is not None:
            headers["X-data-parallel-rank"] = str(rank)
        request = urllib.request.Request(
            self.url + "/v1/completions", json.dumps(body).encode(), headers
        )
        answer = json.loads(urllib.request.urlopen(request, timeout=300).read())
        return answer["choices"][0]["token_ids"]

    def generated(self) -> dict[str, float]:
        """Tokens that each engine has generated, by the rank that /metrics gives."""
        text = urllib.request.urlopen(self.url + "/metrics", timeout=30).read().decode()
        found = re.findall(
            r'^vllm:generation_tokens_total\{.*?engine="(\d)".*?\} (\S+)', text, re.M
        )
        return {rank: float(value) for rank, value in found}

    def end(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(90)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def server(trio, tmp_path_factory):
    server = Server(trio, tmp_path_factory.mktemp("server") / "log")
    try:
        server.wait()
        yield server
    finally:
        server.end()


@pytest.mark.timeout(1200)
def test_each_rank_answers_as_the_loop_and_alone(server, trio):
    models = Trio.load(trio["model"], trio["expert"], trio["antiexpert"], torch.float32)
    for rank, length in ((0, 9), (1, 9), (1, 40), (0, 40)):
        (prompt,) = prompt_ids([length], seed=length)
        before = server.generated()
        assert set(before) == {"0", "1"}
        assert server.complete(prompt, rank=rank) == greedy(models, prompt, 8, 1.5)[0]
        xargs = {"vllm_xargs": {"proxy_alpha": 0.5}}
        assert server.complete(prompt, rank=rank, **xargs) == greedy(models, prompt, 8, 0.5)[0]
        deadline = time.monotonic() + 60
        # Counters follow the answers by a moment.
        while (after := server.generated())[str(rank)] < before[str(rank)] + 16:
            assert time.monotonic() < deadline, f"rank {rank} did not run it: {before} -> {after}"
            time.sleep(0.1)
        other = str(1 - rank)
        assert after[other] == before[other]


def test_seeded_sampling_does_not_depend_on_the_rank(server):
    (prompt,) = prompt_ids([12], seed=3)
    drawn = [
        server.complete(prompt, rank=rank, temperature=1.0, seed=11, max_tokens=16)
        for rank in (0, 1)
    ]
    assert drawn[0] == drawn[1]
    assert server.complete(prompt, temperature=1.0, seed=12, max_tokens=16) != drawn[0]
