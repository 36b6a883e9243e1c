"""SIGTERM to a server whose engine is still loading: it ends soon, and so does its engine."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from engines import free_port


@pytest.mark.slow
def test_a_server_that_loads_ends_when_told(trio, tmp_path):
    log = tmp_path / "log"
    command = [
        *(sys.executable, "-m", "proxy_vllm.cli.main", "serve", trio["model"]),
        *("--expert", trio["expert"], "--antiexpert", trio["antiexpert"], "--dtype", "float32"),
        *("--port", str(free_port()), "--enforce-eager", "--max-model-len", "256"),
        *("--kv-cache-memory-bytes", str(32 << 20)),
    ]
    environment = {**os.environ, "VLLM_LOGGING_LEVEL": "DEBUG"}
    with open(log, "w") as out:
        server = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
    try:
        deadline = time.monotonic() + 240
        # The engine has said hello, and the server waits for it to be ready.
        while "HELLO from local core engine" not in log.read_text():
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.1)
        started = psutil.Process(server.pid).children(recursive=True)
        server.terminate()
        assert server.wait(timeout=40) == 128 + signal.SIGTERM, log.read_text()[-3000:]
        _, alive = psutil.wait_procs(started, timeout=10)
        assert not alive
    finally:
        server.kill()
