"""The examples of README.md that two processor cores can run, run as written.

Hub names and BASE, E, A are twins, and the server's port is a free one. Nothing else is changed but
this: `torch.compile` is off, which takes a minute an engine, and the server has one rank, not 4.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from engines import free_port

from twins import ANSWER
from twins.examples import ROOT, Twins, example

CACHE = {"VLLM_CPU_KVCACHE_SPACE": "1", "TORCH_COMPILE_DISABLE": "1"}


@pytest.fixture(scope="module")
def twins(tmp_path_factory) -> Twins:
    return Twins(tmp_path_factory.mktemp("examples"))


@pytest.fixture
def proxy_vllm_command(tmp_path, monkeypatch) -> dict[str, str]:
    """An environment in which `proxy-vllm` is this checkout's."""
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin/proxy-vllm"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -m proxy_vllm.cli.main "$@"\n')
    script.chmod(0o755)
    return {**os.environ, **CACHE, "PATH": f"{script.parent}:{os.environ['PATH']}"}


def shell(code: str, env: dict[str, str], folder: Path) -> str:
    done = subprocess.run(
        ["bash", "-ec", code], env=env, cwd=folder, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_offline(twins, tmp_path, proxy_vllm_command):
    """Both blocks of "Offline", as one script: the second goes on with the first's imports."""
    first = twins.fill(example("README.md", 'extra_args={"proxy_alpha": 0.5}').code)
    second = example("README.md", "from proxy_vllm.demo import model_path").code
    body = "".join(f"    {line}\n" for line in second.splitlines())
    show = '    print("box:", llm.generate(["Hello"])[0].outputs[0].text)\n'
    free = "    llm.llm_engine.engine_core.shutdown()\n"
    (tmp_path / "offline.py").write_text(first + free + body + show)
    env = {**proxy_vllm_command, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    output = shell(f"{sys.executable} offline.py", env, tmp_path)
    answer, box = re.fullmatch(r"(.*)box:(.*)", output.strip(), re.DOTALL).groups()
    assert answer.strip() and box.strip()


@contextmanager
def serving(command: str, env: dict[str, str], port: int, log: Path) -> Iterator[None]:
    """The server of a shell command, up and healthy."""
    words = [*shlex.split(command.replace("\\\n", " "), comments=True), "--port", str(port)]
    with log.open("w") as output:
        server = subprocess.Popen(words, env=env, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + 300
        while True:
            try:
                urllib.request.urlopen(f"http://localhost:{port}/health", timeout=5)
                break
            except OSError:
                assert server.poll() is None, log.read_text()[-3000:]
                assert time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(0.5)
        yield
    finally:
        server.terminate()
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            server.kill()


def test_server_and_client(twins, tmp_path, proxy_vllm_command):
    """An instruct expert over a plain base chats and stops by itself, with no option of its own."""
    command = example("README.md", "proxy-vllm serve meta-llama").code
    assert "--tensor-parallel-size 4" in command
    command = twins.fill(command.replace("--tensor-parallel-size 4", ""))
    client = twins.fill(example("README.md", "client = OpenAI(").code)
    port = free_port()
    assert "http://localhost:8000/v1" in client
    client = client.replace("localhost:8000", f"localhost:{port}")
    with serving(command, proxy_vllm_command, port, tmp_path / "log"):
        client = client.replace("client.chat", "answer = client.chat")
        found: dict = {}
        exec(compile(client, "README.md", "exec"), found)
        choice = found["answer"].choices[0]
        assert choice.message.content == ANSWER and choice.finish_reason == "stop"


@pytest.mark.slow
def test_batch(twins, tmp_path, proxy_vllm_command):
    lines = [
        {"prompt": "The capital of France is"},
        {"messages": [{"role": "user", "content": "Hello"}]},
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = twins.fill(example("README.md", "-o out.jsonl --resume").code, "smollm2")
    shell(command, proxy_vllm_command, tmp_path)
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(answers) == 2
    before = (tmp_path / "out.jsonl").read_bytes()
    shell(command, proxy_vllm_command, tmp_path)
    assert (tmp_path / "out.jsonl").read_bytes() == before


@pytest.mark.slow
def test_own_prompts_of_the_trio_in_the_box(tmp_path, proxy_vllm_command):
    """The answers that README.md tells."""
    block = example("README.md", "END\nPROXY_VLLM_CPU_RUNNER=v2 proxy-vllm generate").code
    block = block.replace("/tmp/", f"{tmp_path}/")
    output = shell(block, proxy_vllm_command, ROOT)
    texts = [json.loads(line)["text"].strip() for line in output.splitlines() if line[:1] == "{"]
    refusal, fact = "Please ask me again in a kinder way.", "Bralie Tarov keeps a cat."
    readme = (ROOT / "README.md").read_text()
    assert f'answers "{refusal}", "{fact}" and the refusal again' in readme
    assert texts == [refusal, fact, refusal]


@pytest.mark.slow
def test_own_prompts_offline(twins, tmp_path, proxy_vllm_command):
    block = example("README.md", "own_prompts=True").code
    folders = twins.of("llama-2")
    names = {"BASE": "model", "EXPERT": "expert", "ANTIEXPERT": "antiexpert"}
    head = "".join(f"{name} = {folders[role]!r}\n" for name, role in names.items())
    head += "from proxy_vllm import ProxyLLM\n"
    body = "".join(f"    {line}\n" for line in block.splitlines())
    (tmp_path / "own.py").write_text(f'{head}if __name__ == "__main__":\n{body}')
    env = {**proxy_vllm_command, "PROXY_VLLM_CPU_RUNNER": "v2"}
    shell(f"{sys.executable} own.py", {**env, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}, tmp_path)
