"""The servers that are soaked: one `proxy-vllm serve`, or two replicas on Ray Serve."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psutil

from proxy_vllm.demo import model_path
from soaking.asking import MODEL

# A KV cache of 448 tokens, where 16 running requests may want twice as many: some are preempted.
ENGINE = [
    str(model_path("base")), "--expert", str(model_path("expert")),
    "--antiexpert", str(model_path("antiexpert")), "--served-model-name", MODEL,
    "--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "16", "--block-size", "32",
    "--num-gpu-blocks-override", "14", "--kv-cache-memory-bytes", str(16 << 20),
    "--enable-auto-tool-choice",
    "--tool-call-parser", "hermes",
]  # fmt: skip


def heed_interrupts() -> None:
    """Before a child runs: a shell's background job ignores SIGINT, and its children would too."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Server:
    """One server process and its log; `process` is the root of all that it starts."""

    def __init__(self, folder: Path, engine_args: list[str]) -> None:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.log = folder / "server.log"
        self.folder, self.port, self.engine_args = folder, port, [*ENGINE, *engine_args]
        with open(self.log, "w") as log:
            self.process = psutil.Popen(
                self.command(),
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment(),
                preexec_fn=heed_interrupts,
            )
        self.wait_until(self.healthy, 300)

    def command(self) -> list[str]:
        serve = [sys.executable, "-m", "proxy_vllm.cli.main", "serve", *self.engine_args]
        return [*serve, "--host", "127.0.0.1", "--port", str(self.port)]

    def environment(self) -> dict[str, str]:
        return {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1", **os.environ}

    def healthy(self) -> bool:
        try:
            return urllib.request.urlopen(f"{self.url}/health", timeout=5).status == 200
        except OSError:
            return False

    def wait_until(self, condition, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.end()
                raise RuntimeError(f"waited in vain:\n{self.log.read_text()[-4000:]}")
            time.sleep(0.5)

    def metric(self, name: str) -> float:
        """Sum of a counter or gauge over its labels."""
        text = urllib.request.urlopen(f"{self.url}/metrics", timeout=30).read().decode()
        found = re.findall(rf"^{re.escape(name)}(?:\{{.*\}})? (\S+)$", text, re.M)
        return sum(map(float, found))

    def family(self) -> list[psutil.Process]:
        try:
            return [self.process, *self.process.children(recursive=True)]
        except psutil.Error:
            return []

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def end(self) -> None:
        """Leave nothing behind, whatever state it is in."""
        for process in reversed(self.family()):
            try:
                process.kill()
            except psutil.Error:
                continue


class Replicas(Server):
    """Two replicas on a Ray that is started with them; both must be kept alive by it."""

    def command(self) -> list[str]:
        config = {
            "proxy_location": "HeadOnly",
            "http_options": {"host": "127.0.0.1", "port": self.port},
            "applications": [
                {
                    "name": "proxy",
                    "import_path": "proxy_vllm.serving:app",
                    "args": {"options": shlex.join(self.engine_args)},
                    "deployments": [
                        {"name": "ProxyServer", "num_replicas": 2, "autoscaling_config": None}
                    ],
                }
            ],
        }
        file = self.folder / "config.yaml"
        file.write_text(json.dumps(config))  # JSON is YAML
        return [sys.executable, "-m", "ray.serve.scripts", "run", str(file)]

    def environment(self) -> dict[str, str]:
        quiet = {"RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0", "RAY_USAGE_STATS_ENABLED": "0"}
        return {**super().environment(), **quiet, "RAY_AUTH_MODE": "disabled"}

    def engines(self) -> list[psutil.Process]:
        found = []
        for process in self.family():
            try:
                if "EngineCore" in " ".join([process.name(), *process.cmdline()]):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGINT)
