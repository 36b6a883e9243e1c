"""A base behind a real vLLM server: its answers are those of the same trio with the base here."""

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import dashboard
import numpy as np
import pytest
import torch
from engines import free_port, greedy_params, prompt_ids, running
from reference_loop import Trio, greedy, prompt_logits
from vllm import SamplingParams

from proxy_vllm.errors import UserError

KEY = "sk-base"
KEYS = {"PROXY_VLLM_BASE_API_KEY": KEY}


def plain_environment() -> dict[str, str]:
    """Of a process with vLLM's own runner for a CPU, whatever runner this process asks for."""
    set_here = ("TRITON_INTERPRET", "VLLM_USE_V2_MODEL_RUNNER", "PROXY_VLLM_CPU_RUNNER")
    env = {name: value for name, value in os.environ.items() if name not in set_here}
    paths = env.get("PYTHONPATH", "").split(os.pathsep)
    env["PYTHONPATH"] = os.pathsep.join(p for p in paths if not p.endswith("cpu_interpreter"))
    return env


class PlainServer:
    """Plain vLLM, the way that somebody else serves a base."""

    def __init__(self, model: str, log: Path, *options: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}/v1"
        command = [
            *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model),
            *("--host", "127.0.0.1", "--port", str(self.port), "--served-model-name", "base"),
            *("--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--api-key", KEY),
            *("--kv-cache-memory-bytes", str(64 << 20), "--max-logprobs", "-1", *options),
        ]
        with open(log, "w") as out:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, env=plain_environment()
            )
        wait_for(f"http://127.0.0.1:{self.port}/health", self.process, log)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=60)


def wait_for(url: str, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 300
    while True:
        try:
            if urllib.request.urlopen(url, timeout=5).status == 200:
                return
        except OSError:
            pass
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"the server did not come up:\n{log.read_text()[-3000:]}")
        time.sleep(0.5)


@pytest.fixture(scope="module")
def base(trio, tmp_path_factory) -> Iterator[PlainServer]:
    server = PlainServer(trio["model"], tmp_path_factory.mktemp("base") / "log")
    yield server
    server.stop()


@pytest.fixture(scope="module")
def reference(trio) -> Trio:
    return Trio.load(trio["model"], trio["expert"], trio["antiexpert"], torch.float32)


@pytest.fixture(scope="module")
def llm(base, trio):
    small = {role: trio[role] for role in ("expert", "antiexpert")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PROXY_VLLM_BASE_API_KEY", KEY)
        options = {"model": None, "base_url": base.url, "base_model": "base"}
        with running(**options, **small, base_args={"max_questions": 8}) as engine:
            yield engine


def report(output) -> dict:
    return output.kv_transfer_params["proxy"]


def set_top(llm, k: int) -> None:
    llm.llm_engine.engine_core.endpoint.top = k


@pytest.mark.parametrize("k", [1, 5, 20])
def test_exact_answers_are_those_of_a_local_base(llm, reference, k):
    prompts = prompt_ids([3, 5, 9, 17, 33, 40, 4, 8, 6, 12], seed=k)
    set_top(llm, k)
    alphas = [1.0, 0.5, 0.0, 2.0, -1.0] * 2
    outputs = llm.generate(
        [{"prompt_token_ids": ids} for ids in prompts],
        [greedy_params(12, proxy_alpha=alpha) for alpha in alphas],
        use_tqdm=False,
    )
    for ids, alpha, output in zip(prompts, alphas, outputs):
        expected, _ = greedy(reference, ids, 12, alpha)
        assert list(output.outputs[0].token_ids) == expected
        assert all(report(output)["certified"])
        if alpha == 0:
            assert report(output)["usage"]["trips"] == 1


def test_top_k_mode_bounds_the_true_distribution(llm, reference):
    set_top(llm, 40)
    core = llm.llm_engine.engine_core
    settings = core.endpoint.settings
    core.endpoint.settings = type(settings)(**{**vars(settings), "mode": "top-k"})
    try:
        prompts = prompt_ids([4, 9, 20], seed=3)
        outputs = llm.generate(
            [{"prompt_token_ids": ids} for ids in prompts],
            greedy_params(10, logprobs=40),
            use_tqdm=False,
        )
    finally:
        core.endpoint.settings = settings
    certified = 0
    for ids, output in zip(prompts, outputs):
        tokens = list(output.outputs[0].token_ids)
        rows = prompt_logits(reference, [*ids, *tokens])[len(ids) - 1 :].log_softmax(-1)
        for token, known, row, sure, cut in zip(
            tokens,
            output.outputs[0].logprobs,
            rows,
            report(output)["certified"],
            report(output)["cut_mass"],
        ):
            mass = sum(float(row[t].exp()) for t in known)
            assert 1 - mass <= cut + 5e-3
            if sure:
                certified += 1
                assert token == int(row.argmax())
    assert certified


def test_stop_tokens_strings_and_several_answers(llm, reference):
    set_top(llm, 20)
    (ids,) = prompt_ids([9], seed=11)
    expected, _ = greedy(reference, ids, 12)
    stop = expected[4]
    prompt = {"prompt_token_ids": ids}
    (output,) = llm.generate(prompt, greedy_params(12, stop_token_ids=[stop]), use_tqdm=False)
    cut = expected.index(stop) + 1
    assert list(output.outputs[0].token_ids) == expected[:cut]
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", stop)
    word = llm.get_tokenizer().decode([stop])
    (output,) = llm.generate(prompt, greedy_params(12, stop=[word]), use_tqdm=False)
    assert output.outputs[0].stop_reason == word
    params = SamplingParams(n=3, temperature=1.0, seed=5, max_tokens=6, ignore_eos=True)
    (output,) = llm.generate(prompt, params, use_tqdm=False)
    texts = {tuple(answer.token_ids) for answer in output.outputs}
    assert len(output.outputs) == 3 and len(texts) > 1
    (again,) = llm.generate(prompt, params, use_tqdm=False)
    assert {tuple(answer.token_ids) for answer in again.outputs} == texts


def test_penalties_reach_the_steered_row(llm, reference):
    set_top(llm, 20)
    (ids,) = prompt_ids([6], seed=12)

    def process(tokens, logits):
        for token in set(tokens):
            logits[token] -= 1.5 + 0.5 * tokens.count(token)
        logits[7] += 3.0
        return logits

    expected, _ = greedy(reference, ids, 12, process=process)
    params = greedy_params(12, presence_penalty=1.5, frequency_penalty=0.5, logit_bias={7: 3.0})
    (output,) = llm.generate({"prompt_token_ids": ids}, params, use_tqdm=False)
    assert list(output.outputs[0].token_ids) == expected


def test_drafts_save_trips_and_change_no_token(llm, reference):
    set_top(llm, 20)
    prompts = [{"prompt_token_ids": ids} for ids in prompt_ids([5, 9, 14], seed=13)]
    plain = llm.generate(prompts, greedy_params(12), use_tqdm=False)
    core = llm.llm_engine.engine_core
    settings = core.endpoint.settings
    core.endpoint.settings = type(settings)(**{**vars(settings), "drafts": 3})
    try:
        drafted = llm.generate(prompts, greedy_params(12), use_tqdm=False)
    finally:
        core.endpoint.settings = settings
    for a, b in zip(plain, drafted):
        assert a.outputs[0].token_ids == b.outputs[0].token_ids
    trips = [sum(report(o)["usage"]["trips"] for o in outputs) for outputs in (plain, drafted)]
    assert trips[1] <= trips[0]


def test_a_refused_request_harms_no_other(llm, reference):
    set_top(llm, 20)
    prompts = prompt_ids([5, 6], seed=14)
    params = [greedy_params(4, repetition_penalty=1.2), greedy_params(4)]
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
    assert outputs[0].outputs[0].finish_reason == "error"
    assert "repetition_penalty" in outputs[0].outputs[0].stop_reason
    assert list(outputs[1].outputs[0].token_ids) == greedy(reference, prompts[1], 4)[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_model": "other"}, "it answered 404"),
        ({"base_url": "http://127.0.0.1:9/v1"}, "--base-url http://127.0.0.1:9/v1"),
        ({"key": "wrong"}, "it answered 401"),
        ({"speculative_tokens": 2}, "--speculative-tokens"),
        ({"model": "x"}, "give one of them"),
        ({"base_model": None}, "--base-model"),
    ],
)
def test_bad_endpoints_are_named_before_anything_is_loaded(
    base, trio, monkeypatch, options, message
):
    from proxy_vllm import ProxyLLM

    options = dict(options)
    monkeypatch.setenv("PROXY_VLLM_BASE_API_KEY", options.pop("key", KEY))
    given = {"base_url": base.url, "base_model": "base", **options}
    with pytest.raises(UserError) as refused:
        ProxyLLM(expert=trio["expert"], antiexpert=trio["antiexpert"], **given)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value) and KEY not in str(refused.value)


@pytest.fixture(scope="module")
def served(base, trio, tmp_path_factory):
    import openai

    log = tmp_path_factory.mktemp("served") / "log"
    port = free_port()
    command = [
        *(sys.executable, "-m", "proxy_vllm.cli.main", "serve"),
        *("--base-url", base.url, "--base-model", "base", "--price", "1,2"),
        *("--expert", trio["expert"], "--antiexpert", trio["antiexpert"]),
        *("--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"),
        *("--max-model-len", "512", "--kv-cache-memory-bytes", str(64 << 20)),
    ]
    with open(log, "w") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **KEYS}
        )
    wait_for(f"http://127.0.0.1:{port}/health", process, log)
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="-", max_retries=0)
    yield client, port, log
    process.terminate()
    process.wait(timeout=90)
    assert KEY not in log.read_text()


def test_the_server_answers_as_any(served, reference):
    import openai

    client, port, _ = served
    (ids,) = prompt_ids([9], seed=21)
    expected, _ = greedy(reference, ids, 8)
    extra = {"return_token_ids": True, "ignore_eos": True}
    plain = client.completions.create(
        model="base", prompt=ids, max_tokens=8, temperature=0, logprobs=3, extra_body=extra
    )
    answer = plain.choices[0].model_dump()
    assert answer["token_ids"] == expected
    assert len(answer["logprobs"]["top_logprobs"]) == 8
    assert plain.model_dump()["kv_transfer_params"]["proxy"]["certified"] == [True] * 8
    assert plain.model_dump()["kv_transfer_params"]["proxy"]["usage"]["dollars"] > 0

    weaker, _ = greedy(reference, ids, 8, 0.3)
    other = client.completions.create(
        model="base",
        prompt=ids,
        max_tokens=8,
        temperature=0,
        extra_body={**extra, "vllm_xargs": {"proxy_alpha": 0.3}},
    )
    assert other.choices[0].model_dump()["token_ids"] == weaker

    chunks = [
        chunk.model_dump()
        for chunk in client.completions.create(
            model="base", prompt=ids, max_tokens=8, temperature=0, stream=True, extra_body=extra
        )
    ]
    assert [t for chunk in chunks for c in chunk["choices"] for t in c["token_ids"]] == expected
    assert chunks[-1]["kv_transfer_params"]["proxy"]["certified"] == [True] * 8
    assert not any("kv_transfer_params" in chunk for chunk in chunks[:-1])

    chat = client.chat.completions.create(
        model="base",
        messages=[{"role": "user", "content": "w5 w6"}],
        max_tokens=5,
        temperature=1.0,
        n=2,
        logprobs=True,
        top_logprobs=2,
    )
    assert len(chat.choices) == 2
    assert all(choice.logprobs.content for choice in chat.choices)
    reports = chat.model_dump()["kv_transfer_params"]["proxy"]
    for choice, one in zip(chat.choices, reports):
        assert len(one["certified"]) == len(choice.logprobs.content)
    # A stop string is seen by vLLM's front end and not by the engine core.
    stop = plain.choices[0].logprobs.tokens[3].strip()
    stopped = client.completions.create(
        model="base", prompt=ids, max_tokens=8, temperature=0, stop=[stop], extra_body=extra
    ).model_dump()
    assert stopped["choices"][0]["stop_reason"] == stop
    count = len(stopped["choices"][0]["token_ids"])
    assert stopped["kv_transfer_params"]["proxy"]["certified"] == [True] * count
    # Several prompts, two answers each: a report for each choice.
    several = client.completions.create(
        model="base", prompt=[ids, ids[:5]], n=2, max_tokens=4, seed=3, extra_body=extra
    ).model_dump()
    reports = several["kv_transfer_params"]["proxy"]
    assert [len(r["certified"]) for r in reports] == [4] * 4
    chat_chunks = [
        chunk.model_dump()
        for chunk in client.chat.completions.create(
            model="base",
            messages=[{"role": "user", "content": "w5 w6"}],
            max_tokens=5,
            n=2,
            stream=True,
        )
    ]
    ended = [c for c in chat_chunks if c["choices"][0]["finish_reason"]]
    assert len(ended) == 2
    assert all(len(c["kv_transfer_params"]["proxy"]["cut_mass"]) for c in ended)

    with pytest.raises(openai.BadRequestError, match="repetition_penalty"):
        client.completions.create(
            model="base", prompt=ids, max_tokens=2, extra_body={"repetition_penalty": 1.3}
        )
    page = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
    for name in ("trips", "calls", "tokens", "certified", "prompt_tokens"):
        assert f"proxy_vllm:remote_base_{name}_total" in page
    for query in dashboard.queries("A base elsewhere"):
        assert not dashboard.unanswered(query, page), query
    value = next(
        float(line.split()[-1])
        for line in page.splitlines()
        if line.startswith("proxy_vllm:remote_base_tokens_total")
    )
    assert value >= 24


def test_batches_go_on_after_an_outage(base, trio, tmp_path, reference):
    lines = prompt_ids([5, 7, 9], seed=31)
    prompts = tmp_path / "in.jsonl"
    prompts.write_text(
        "".join(
            json.dumps({"prompt": ids, "temperature": 0, "max_tokens": 4, "ignore_eos": True})
            + "\n"
            for ids in lines
        )
    )
    out = tmp_path / "out.jsonl"

    def generate(*options: str) -> subprocess.CompletedProcess:
        command = [
            *(sys.executable, "-m", "proxy_vllm.cli.main", "generate"),
            *("--base-url", base.url, "--base-model", "base", "--token-ids"),
            *("--expert", trio["expert"], "--antiexpert", trio["antiexpert"]),
            *("--dtype", "float32", "--enforce-eager", "--max-model-len", "256"),
            *("--kv-cache-memory-bytes", str(32 << 20), "-i", str(prompts), "-o", str(out)),
            *options,
        ]
        return subprocess.run(
            command, env={**os.environ, **KEYS}, capture_output=True, text=True, timeout=300
        )

    # A limit on calls stands for an outage: what is answered stays, the rest is tried again.
    done = generate("--base-max-calls", "4", "--on-error", "skip")
    assert done.returncode == 1, done.stderr
    assert "limit of 4 calls" in (tmp_path / "out.jsonl.errors.jsonl").read_text()
    done = generate("--resume", "--on-error", "skip")
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert [a["token_ids"] for a in answers] == [greedy(reference, ids, 4)[0] for ids in lines]
    assert all(a["proxy"]["certified"] == [True] * 4 for a in answers)
    assert np.isfinite(answers[0]["proxy"]["cut_mass"]).all()
