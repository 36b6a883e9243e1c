"""A real `proxy-vllm serve` process, asked by the `openai` client."""

import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import dashboard
import openai
import pytest
import torch
from engines import free_port, prompt_ids
from reference_loop import Trio, greedy

PROMPT = prompt_ids([9])[0]
KEY = "sk-test"


class Server:
    """One server process; its log is shown when it does not come up.

    ``options`` come last, and so before the ones that are here.
    """

    def __init__(self, trio: dict[str, str], log_path, *options: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log_path = log_path
        command = [
            *(sys.executable, "-m", "proxy_vllm.cli.main", "serve", trio["model"]),
            *(
                part
                for role in ("expert", "antiexpert")
                if role in trio
                for part in (f"--{role}", trio[role])
            ),
            *("--alpha", "1.5"),
            *("--host", "127.0.0.1", "--port", str(self.port), "--api-key", KEY),
            *("--served-model-name", "steered", "--dtype", "float32", "--enforce-eager"),
            *("--max-model-len", "512", "--kv-cache-memory-bytes", str(64 << 20)),
            *options,
        ]
        with open(log_path, "w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 300
        while self.status("/health") != 200:
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.process.kill()
                pytest.fail(f"the server did not come up:\n{log_path.read_text()[-3000:]}")
            time.sleep(0.5)
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0)

    def stop(self) -> None:
        """End it so that its engine ends too, which a kill would leave behind."""
        self.process.terminate()
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def status(self, path: str) -> int | None:
        try:
            return urllib.request.urlopen(self.url + path, timeout=5).status
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return None

    def complete(self, alpha=None, **kwargs):
        xargs = {} if alpha is None else {"vllm_xargs": {"proxy_alpha": alpha}}
        extra = {"return_token_ids": True, "ignore_eos": True, **xargs, **kwargs.pop("extra", {})}
        return self.client.completions.create(
            model="steered", prompt=kwargs.pop("prompt", PROMPT),
            extra_body=extra, **{"max_tokens": 8, "temperature": 0, **kwargs},
        )  # fmt: skip


@pytest.fixture(scope="module")
def server(trio, tmp_path_factory):
    if os.environ.get("PROXY_VLLM_CPU_RUNNER") == "v2":
        pytest.skip("one server is enough: the HTTP layer does not depend on the runner")
    server = Server(trio, tmp_path_factory.mktemp("server") / "log")
    yield server
    server.stop()


@pytest.fixture(scope="module")
def models(trio):
    return Trio.load(trio["model"], trio["expert"], trio["antiexpert"], torch.float32)


def test_completions_take_the_requests_alpha_or_the_servers(server, models):
    for alpha in (None, 0, 0.5, -1):
        want, _ = greedy(models, PROMPT, 8, 1.5 if alpha is None else alpha)
        choice = server.complete(alpha).choices[0]
        assert choice.token_ids == want


def test_streaming_and_logprobs(server, models):
    want, steps = greedy(models, PROMPT, 8, 0.5)
    tokens, logprobs = [], []
    for chunk in server.complete(0.5, stream=True, logprobs=0):
        tokens += chunk.choices[0].token_ids or []
        if chunk.choices[0].logprobs:
            logprobs += chunk.choices[0].logprobs.token_logprobs
    assert tokens == want
    expected = [float(s.log_softmax(-1)[t]) for s, t in zip(steps, want)]
    assert logprobs == pytest.approx(expected, abs=1e-3)


def test_chat_uses_the_template_and_alpha(server, trio, models):
    from transformers import AutoTokenizer

    messages = [{"role": "user", "content": "w7 w8 w9"}]
    tokenizer = AutoTokenizer.from_pretrained(trio["model"])
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    want, _ = greedy(models, ids, 6, 0.25)
    answer = server.client.chat.completions.create(
        model="steered", messages=messages, temperature=0, max_tokens=6,
        extra_body={"vllm_xargs": {"proxy_alpha": 0.25}, "ignore_eos": True},
    )  # fmt: skip
    assert answer.choices[0].message.content.split() == tokenizer.decode(want).split()
    assert answer.usage.prompt_tokens == len(ids)


def test_a_member_by_itself(server, trio):
    for member in ("expert", "antiexpert"):
        alone = Trio.load(*[trio[member]] * 3, torch.float32)
        asked = {"vllm_xargs": {"proxy_member": member}}
        choice = server.complete(extra=asked).choices[0]
        assert choice.token_ids == greedy(alone, PROMPT, 8, 0.0)[0]


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), 10.5, "much", True])
def test_an_alpha_that_cannot_run_is_a_400_that_harms_nobody(server, models, alpha):
    outcome = {}

    def other() -> None:
        outcome["tokens"] = server.complete(1.0, max_tokens=64).choices[0].token_ids

    thread = threading.Thread(target=other)
    thread.start()
    body = f'{{"model": "steered", "prompt": [5], "vllm_xargs": {{"proxy_alpha": {_json(alpha)}}}}}'
    request = urllib.request.Request(
        server.url + "/v1/completions", body.encode(),
        {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"},
    )  # fmt: skip
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request)
    assert refused.value.code == 400
    assert b"proxy_alpha" in refused.value.read()
    thread.join()
    assert outcome["tokens"] == greedy(models, PROMPT, 64, 1.0)[0]


def _json(value) -> str:
    import json

    return json.dumps(value)  # writes NaN and Infinity, as many clients do


def explained(server, **fields):
    """Choices with what steering did, of a completion; streamed ones put together."""
    xargs = {"proxy_alpha": 0.5, "proxy_explain": True, **fields.pop("xargs", {})}
    answer = server.complete(extra={"vllm_xargs": xargs}, **fields)
    if not fields.get("stream"):
        return [(c.token_ids, c.text, c.proxy_explain) for c in answer.choices]
    found: dict[int, tuple[list, str, list]] = {}
    for chunk in answer:
        for choice in chunk.choices:
            tokens, text, entries = found.get(choice.index, ([], "", []))
            more, new = choice.token_ids or [], getattr(choice, "proxy_explain", [])
            assert [e["token_id"] for e in new] == more
            found[choice.index] = (tokens + more, text + choice.text, entries + new)
    return [found[i] for i in sorted(found)]


def test_answers_say_what_steering_did(server, models):
    from explained import log_probabilities

    plain = [server.complete(0.5).choices[0].token_ids]
    (once,) = explained(server)
    assert once[0] == plain[0] == [entry["token_id"] for entry in once[2]]
    truth = log_probabilities(models, PROMPT, once[0], 0.5)
    for at, entry in enumerate(once[2]):
        assert entry["alpha"] == 0.5 and 5 <= len(entry["top"]) <= 11
        assert entry["changed"] == (entry["base_choice"] != entry["steered_choice"])
        assert entry["base_choice"] == truth["base"][at].argmax()
        for shown in (entry, *entry["top"]):
            for view, rows in truth.items():
                assert abs(shown[view] - rows[at][shown["token_id"]]) < 1e-4
    assert explained(server, stream=True) == [once]
    two = [PROMPT, PROMPT[:4]]
    asked = {"prompt": two, "n": 2, "temperature": 1, "seed": 7}
    several = explained(server, **asked, xargs={"proxy_explain_top": 2})
    assert [len(entries) for _, _, entries in several] == [8] * 4
    assert explained(server, **asked, xargs={"proxy_explain_top": 2}, stream=True) == several
    (with_logprobs,) = explained(server, logprobs=1)
    assert with_logprobs == once
    # Who does not ask gets no such field.
    assert not hasattr(server.complete(0.5).choices[0], "proxy_explain")
    for chunk in server.complete(stream=True, extra={"vllm_xargs": {"proxy_explain": False}}):
        assert not hasattr(chunk.choices[0], "proxy_explain")


def test_chats_say_what_steering_did(server):
    extra = {"vllm_xargs": {"proxy_explain": True}, "ignore_eos": True, "return_token_ids": True}
    request = {
        "model": "steered", "messages": [{"role": "user", "content": "w7 w8 w9"}],
        "temperature": 0, "max_tokens": 6, "extra_body": extra,
    }  # fmt: skip
    chats = server.client.chat.completions
    choice = chats.create(**request).choices[0]
    assert [entry["token_id"] for entry in choice.proxy_explain] == choice.token_ids
    entries = []
    for chunk in chats.create(**request, stream=True):
        new = getattr(chunk.choices[0], "proxy_explain", [])
        assert [e["token_id"] for e in new] == (getattr(chunk.choices[0], "token_ids", None) or [])
        entries += new
    assert entries == choice.proxy_explain


def read_metrics(server) -> dict[str, float]:
    """Each name of `/metrics`, with its labels, and its value."""
    page = urllib.request.urlopen(server.url + "/metrics").read().decode()
    lines = [line.rsplit(" ", 1) for line in page.splitlines() if not line.startswith("#")]
    return {name: float(number) for name, number in lines}


def test_metrics_of_drafts_and_of_steering_over_two_front_ends(trio, models, tmp_path):
    """Two API servers answer in turn as the system likes; each tells the counts of both."""
    options = ("--api-server-count", "2", "--changed-tokens-every", "1")
    server = Server(trio, tmp_path / "log", "--speculative-tokens", "2", *options)
    try:
        for _ in range(6):
            new = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)
            new.completions.create(
                model="steered",
                prompt=[5],
                max_tokens=1,
                extra_body={"vllm_xargs": {"proxy_alpha": 0}},
            )
        # Base plus half of the shift: the expert alone drafts right now and then.
        for alpha in (0.5, 1):
            want, _ = greedy(models, PROMPT, 24, alpha)
            assert server.complete(alpha, max_tokens=24).choices[0].token_ids == want
        metrics = read_metrics(server)
        counts = {
            name: sum(number for line, number in metrics.items() if line.startswith(name))
            for name in (
                "vllm:spec_decode_num_draft_tokens_total",
                "vllm:spec_decode_num_accepted_tokens_total",
            )
        }
        drafted, accepted = counts.values()
        assert 0 < accepted < drafted
        for alpha, count in (("0", 6), ("0.25-0.5", 1), ("0.75-1", 1)):
            assert metrics[f'proxy_vllm:requests_total{{alpha="{alpha}"}}'] == count
        assert metrics['proxy_vllm:num_drafts{engine="0"}'] == 2
        # One token of each step: those that a draft brought are not looked at.
        compared = metrics['proxy_vllm:compared_tokens{engine="0"}']
        assert 48 - accepted <= compared <= 48
        assert 0 < metrics['proxy_vllm:changed_tokens{engine="0"}'] < compared
        with pytest.raises(openai.BadRequestError):
            server.complete(99)
        page = urllib.request.urlopen(server.url + "/metrics").read().decode()
        for row in ("Steering", "Answers", "Drafts"):
            for query in dashboard.queries(row):
                assert not dashboard.unanswered(query, page), query
        memory = [name for name in metrics if name.startswith("proxy_vllm:member_memory_bytes{")]
        assert len(memory) == 6 and all(metrics[name] > 0 for name in memory)
    finally:
        server.stop()


def test_key_health_and_metrics(server):
    wrong = openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        wrong.models.list()
    # Who has no key learns nothing of what is admitted.
    with pytest.raises(openai.AuthenticationError):
        wrong.completions.create(
            model="steered", prompt=[5], extra_body={"vllm_xargs": {"proxy_alpha": 99}}
        )
    assert [m.id for m in server.client.models.list()] == ["steered"]
    assert server.status("/health") == 200
    metrics = urllib.request.urlopen(server.url + "/metrics").read().decode()
    assert "vllm:generation_tokens_total" in metrics
    for query in dashboard.queries("Answers"):
        assert not dashboard.unanswered(query, metrics), query


def test_sigterm_finishes_what_is_running(server, models):
    """Last: it ends the server."""
    want, _ = greedy(models, PROMPT, 400, 1.0)
    tokens = []
    for i, chunk in enumerate(server.complete(1.0, max_tokens=400, stream=True)):
        tokens += chunk.choices[0].token_ids or []
        if i == 3:
            server.process.send_signal(signal.SIGTERM)
    assert tokens == want
    assert server.process.wait(timeout=60) == 0
    assert "Traceback" not in server.log_path.read_text()
