"""Adapters over HTTP: named by `model`, loaded and unloaded while requests run."""

import json
import os
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch
from adapter_files import make_adapter
from explained import log_probabilities
from reference_loop import Trio, greedy
from test_server import KEY, PROMPT, Server
from tiny_adapters import make_adapted


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return make_adapted(tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def server(small, tmp_path_factory):
    if os.environ.get("PROXY_VLLM_CPU_RUNNER") == "v2":
        pytest.skip("one server is enough: the HTTP layer does not depend on the runner")
    members = {"model": small["base"], "antiexpert": small["plain"]}
    options = ["--enable-lora", "--max-loras", "3", "--lora-modules"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
        log = tmp_path_factory.mktemp("server") / "log"
        server = Server(members, log, *options, f"safety={small['adapters']['safety']}")
    yield server
    server.stop()


def want(small, adapter: str | None, count: int, alpha: float) -> list[int]:
    expert = small["merged"][adapter] if adapter else small["plain"]
    trio = Trio.load(small["base"], expert, small["plain"], torch.float32)
    return greedy(trio, PROMPT, count, alpha if adapter else 0.0)[0]


def complete(server, model: str, alpha: float, count: int = 8, **kwargs):
    xargs = {"proxy_alpha": alpha}
    extra = {"return_token_ids": True, "ignore_eos": True, "vllm_xargs": xargs}
    return server.client.completions.create(
        model=model, prompt=PROMPT, temperature=0, max_tokens=count, extra_body=extra, **kwargs
    )


def tokens(server, model: str, alpha: float, count: int = 8) -> list[int]:
    return complete(server, model, alpha, count).choices[0].token_ids


def manage(server, what: str, **body: str) -> tuple[int, str]:
    request = urllib.request.Request(
        f"{server.url}/v1/{what}_lora_adapter",
        json.dumps(body).encode(),
        {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"},
    )
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_model_names_the_adapter(server, small):
    assert [m.id for m in server.client.models.list()] == ["steered", "safety"]
    assert tokens(server, "safety", 1.0) == want(small, "safety", 8, 1.0)
    assert tokens(server, "safety", -0.5) == want(small, "safety", 8, -0.5)
    assert tokens(server, "steered", 3.0) == want(small, None, 8, 3.0)
    with pytest.raises(openai.NotFoundError, match="`rude` does not exist"):
        complete(server, "rude", 1.0)


def test_explanations_show_the_adapter_as_the_expert(server, small):
    """Two adapters' and a request without one, in one batch."""
    assert manage(server, "load", lora_name="code", lora_path=small["adapters"]["code"])[0] == 200
    asked = [("safety", 1.0), ("code", -0.5), ("steered", 1.0)]
    with ThreadPoolExecutor(len(asked)) as pool:
        choices = list(pool.map(lambda one: explained(server, *one), asked))
    for (model, alpha), (answer, entries) in zip(asked, choices):
        adapter = None if model == "steered" else model
        assert answer == want(small, adapter, 8, alpha)
        expert = small["merged"][adapter] if adapter else small["plain"]
        trio = Trio.load(small["base"], expert, small["plain"], torch.float32)
        truth = log_probabilities(trio, PROMPT, answer, alpha if adapter else 0.0)
        for at, entry in enumerate(entries):
            for shown in (entry, *entry["top"]):
                for view, rows in truth.items():
                    assert abs(shown[view] - rows[at][shown["token_id"]]) < 1e-4
    assert manage(server, "unload", lora_name="code")[0] == 200


def explained(server, model: str, alpha: float) -> tuple[list[int], list[dict]]:
    answer, entries = [], []
    extra = {"return_token_ids": True, "ignore_eos": True}
    xargs = {"proxy_alpha": alpha, "proxy_explain": True}
    for chunk in server.client.completions.create(
        model=model, prompt=PROMPT, temperature=0, max_tokens=8, stream=True,
        extra_body={**extra, "vllm_xargs": xargs},
    ):  # fmt: skip
        answer += chunk.choices[0].token_ids or []
        entries += getattr(chunk.choices[0], "proxy_explain", [])
    assert [entry["token_id"] for entry in entries] == answer
    return answer, entries


def test_adapters_come_and_go_while_requests_run(server, small):
    """A name is given to another adapter while requests go on with the one that had it."""
    outcome = {}
    begun = threading.Event()

    def long() -> None:
        found: list[int] = []
        for chunk in complete(server, "new", 1.0, 200, stream=True):
            found += chunk.choices[0].token_ids or []
            begun.set()
        outcome["tokens"] = found

    adapters = small["adapters"]
    assert manage(server, "load", lora_name="new", lora_path=adapters["code"])[0] == 200
    assert manage(server, "load", lora_name="new", lora_path=adapters["code"])[0] == 400
    thread = threading.Thread(target=long)
    thread.start()
    assert begun.wait(60)
    assert manage(server, "unload", lora_name="new")[0] == 200
    with pytest.raises(openai.NotFoundError):
        complete(server, "new", 1.0)
    assert manage(server, "load", lora_name="new", lora_path=adapters["terse"])[0] == 200
    assert tokens(server, "new", 1.0) == want(small, "terse", 8, 1.0)
    assert tokens(server, "safety", 1.0) == want(small, "safety", 8, 1.0)
    assert thread.is_alive()  # or the two adapters of one name were in no batch together
    thread.join()
    assert outcome["tokens"] == want(small, "code", 200, 1.0)
    assert manage(server, "unload", lora_name="new")[0] == 200
    assert manage(server, "unload", lora_name="new")[0] == 404


def test_an_adapter_that_cannot_run_is_a_400(server, small, tmp_path):
    large = make_adapter(tmp_path / "large", small["plain"], rank=32)
    status, answer = manage(server, "load", lora_name="large", lora_path=large)
    assert status == 400
    assert "rank 32 is above the server's 16: start with --max-lora-rank 32" in answer
    status, answer = manage(server, "load", lora_name="none", lora_path=str(tmp_path / "none"))
    assert status == 400
    assert "there is no such folder" in answer
    assert tokens(server, "safety", 1.0) == want(small, "safety", 8, 1.0)
