"""The Ray Serve application under `serve run` and a configuration file, asked by `openai`."""

import concurrent.futures
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import urllib.request

import openai
import psutil
import pytest
import torch
from engines import free_port, prompt_ids
from reference_loop import Trio, greedy
from soaking.servers import heed_interrupts

from proxy_vllm.envs import cpu_runner

ray = pytest.importorskip("ray", reason="the extra `ray` is not installed")
pytest.importorskip("ray.serve", reason="the extra `ray` is not installed")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(cpu_runner() == "v2", reason="the HTTP layer is the same on either runner"),
]

PROMPT = prompt_ids([9])[0]
ENGINE = (
    "--served-model-name steered --alpha 1.5 --dtype float32 --enforce-eager --max-model-len 512"
    f" --kv-cache-memory-bytes {64 << 20} --block-size 32"
)
AUTOSCALING = {"max_replicas": 2, "target_ongoing_requests": 2, "upscale_delay_s": 0.5}


class Application:
    """`serve run CONFIG` on a Ray that this process has started, with one replica to begin with."""

    def __init__(self, trio, folder) -> None:
        self.url = f"http://127.0.0.1:{free_port()}"
        self.log_path = folder / "log"
        members = [trio["model"], "--expert", trio["expert"], "--antiexpert", trio["antiexpert"]]
        config = {
            "proxy_location": "HeadOnly",
            "http_options": {"host": "127.0.0.1", "port": int(self.url.rsplit(":", 1)[1])},
            "applications": [
                {
                    "name": "proxy",
                    "import_path": "proxy_vllm.serving:app",
                    "args": {"options": f"{shlex.join(members)} {ENGINE}"},
                    "deployments": [{"name": "ProxyServer", "autoscaling_config": AUTOSCALING}],
                }
            ],
        }
        (folder / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
        address = ray.get_runtime_context().gcs_address
        command = [sys.executable, "-m", "ray.serve.scripts", "run", "--address", address]
        with open(self.log_path, "w") as log:
            self.process = subprocess.Popen(
                [*command, str(folder / "config.yaml")],
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=heed_interrupts,
            )
        self.wait_for(lambda: self.replicas() == 1, 300)
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="-", max_retries=0)

    def replicas(self) -> int:
        from ray import serve

        found = serve.status().applications.get("proxy")
        if found is None or "ProxyServer" not in found.deployments:
            return 0
        assert found.status not in ("DEPLOY_FAILED", "UNHEALTHY"), found.message
        return found.deployments["ProxyServer"].replica_states.get("RUNNING", 0)

    def wait_for(self, condition, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if self.process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"waited in vain:\n{self.log_path.read_text()[-3000:]}")
            time.sleep(0.5)

    def complete(self, alpha=None, **kwargs):
        xargs = {} if alpha is None else {"vllm_xargs": {"proxy_alpha": alpha}}
        return self.client.completions.create(
            model="steered", prompt=PROMPT, temperature=0,
            extra_body={"return_token_ids": True, "ignore_eos": True, **xargs},
            **{"max_tokens": 8, **kwargs},
        )  # fmt: skip

    def started(self) -> str:
        """When the replica that happens to answer was started: which of them it is."""
        text = urllib.request.urlopen(self.url + "/metrics", timeout=30).read().decode()
        return re.search(r"^process_start_time_seconds(?:\{.*\})? (\S+)", text, re.M).group(1)


def engines() -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "EngineCore" in " ".join([process.name(), *process.cmdline()]):
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.fixture(scope="module")
def application(trio, tmp_path_factory):
    os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
    multiprocessing = os.environ.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)  # as for users
    ray.init(
        num_cpus=2, object_store_memory=100 << 20, include_dashboard=False, log_to_driver=False
    )
    application = None
    try:
        application = Application(trio, tmp_path_factory.mktemp("serve"))
        yield application
    finally:
        if application is not None and application.process.poll() is None:
            application.process.kill()
        ray.shutdown()
        if multiprocessing is not None:
            os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = multiprocessing


@pytest.fixture(scope="module")
def models(trio):
    return Trio.load(trio["model"], trio["expert"], trio["antiexpert"], torch.float32)


def test_completions_chat_and_streams_are_the_loops(application, models, trio):
    from transformers import AutoTokenizer

    for alpha in (None, 0, -1):
        want, _ = greedy(models, PROMPT, 8, 1.5 if alpha is None else alpha)
        assert application.complete(alpha).choices[0].token_ids == want
    tokens, chunks = [], 0
    for chunk in application.complete(0.5, stream=True):
        tokens += chunk.choices[0].token_ids or []
        chunks += 1
    assert tokens == greedy(models, PROMPT, 8, 0.5)[0]
    assert chunks > 4  # token by token, not all at the end

    messages = [{"role": "user", "content": "w7 w8 w9"}]
    tokenizer = AutoTokenizer.from_pretrained(trio["model"])
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    answer = application.client.chat.completions.create(
        model="steered", messages=messages, temperature=0, max_tokens=6,
        extra_body={"vllm_xargs": {"proxy_alpha": 0.25}, "ignore_eos": True},
    )  # fmt: skip
    want = tokenizer.decode(greedy(models, ids, 6, 0.25)[0])
    assert answer.choices[0].message.content.split() == want.split()


@pytest.mark.parametrize("alpha", [99, "much", True])
def test_an_alpha_that_cannot_run_is_a_400(application, alpha):
    with pytest.raises(openai.BadRequestError, match="proxy_alpha"):
        application.complete(alpha)


def test_load_starts_a_second_replica_and_both_answer_alike(application, models):
    want, _ = greedy(models, PROMPT, 400, 0.5)
    started = set()
    with concurrent.futures.ThreadPoolExecutor(12) as pool:

        def ask(_) -> None:
            while application.replicas() < 2:
                assert application.complete(0.5, max_tokens=400).choices[0].token_ids == want

        waiting = [pool.submit(ask, i) for i in range(12)]
        application.wait_for(lambda: application.replicas() == 2, 300)
        for asked in waiting:
            asked.result(timeout=120)
        for _ in range(10):
            answers = list(pool.map(lambda _: application.complete(0.5, max_tokens=400), range(12)))
            assert all(answer.choices[0].token_ids == want for answer in answers)
            started |= set(pool.map(lambda _: application.started(), range(12)))
            if len(started) == 2:
                break
    assert len(started) == 2


def test_an_interrupt_ends_it_with_its_engines(application):
    """Last: it ends the application."""
    application.wait_for(engines, 60)
    application.process.send_signal(signal.SIGINT)
    assert application.process.wait(timeout=120) == 0
    deadline = time.monotonic() + 60
    while engines():
        assert time.monotonic() < deadline, f"left behind: {engines()}"
        time.sleep(0.5)
