"""Contrastive decoding and DeRa behind a running server, against the loop of their formula."""

import threading

import openai
import pytest
import torch
from engines import V2, prompt_ids
from reference_loop import Trio
from test_methods import loop
from test_server import Server
from tiny_models import make_methods_models

pytestmark = pytest.mark.skipif(V2, reason="the HTTP layer does not depend on the runner")

PROMPT = prompt_ids([12], vocab=105, seed=92)[0]
CHAT = [2, 7, 8, 9, 3]  # "w7 w8 w9" by the tokenizer's template
TOKENS = 8
SERVERS_ALPHA = 1.5
# What a request names; None is the server's.
ASKED = [(None, None), (0.5, None), (0.5, 0.3), (2.0, 0.0), (0.0, 0.3), (-1.0, 1.0)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    return make_methods_models(tmp_path_factory.mktemp("methods"))


@pytest.fixture(scope="module", params=["contrastive", "dera"])
def served(request, folders, tmp_path_factory):
    """A server, its three models by the formula, and its beta."""
    base, method = folders["base"], request.param
    if method == "contrastive":
        small, names, beta = {"antiexpert": folders["amateur"]}, (base, folders["amateur"]), 0.1
    else:
        small, names, beta = {"expert": folders["aligned"]}, (folders["aligned"], base), 0.0
    log = tmp_path_factory.mktemp(method) / "log"
    server = Server({"model": base, **small}, log, "--method", method)
    yield server, Trio.load(base, *names, torch.float32), beta
    server.stop()


def xargs_of(alpha: float | None, beta: float | None) -> dict[str, float]:
    named = {"proxy_alpha": alpha, "proxy_beta": beta}
    return {key: value for key, value in named.items() if value is not None}


def test_completions_with_their_own_alpha_and_beta(served):
    """Whole and streamed, in one batch, beside requests that are refused."""
    server, trio, servers_beta = served
    answers = {}

    def ask(i: int) -> None:
        extra = {"vllm_xargs": xargs_of(*ASKED[i])}
        answer = server.complete(prompt=PROMPT, max_tokens=TOKENS, extra=extra, stream=bool(i % 2))
        chunks = answer if i % 2 else [answer]
        answers[i] = [token for chunk in chunks for token in chunk.choices[0].token_ids or []]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(ASKED))]
    for thread in threads:
        thread.start()
    for named, words in (
        ({"proxy_beta": 1.5}, "proxy_beta is 1.5"),
        ({"proxy_beta": "much"}, "proxy_beta is 'much'"),
        ({"proxy_alpha": 11}, "proxy_alpha is 11"),
        ({"guidance_scale": 2}, "guidance_scale: it is for --method cfg"),
        ({"proxy_negative_prompt": "w5"}, "proxy_negative_prompt is for --method cfg"),
    ):
        with pytest.raises(openai.BadRequestError, match=words):
            server.complete(extra={"vllm_xargs": named})
    for thread in threads:
        thread.join()
    for i, (alpha, beta) in enumerate(ASKED):
        alpha = SERVERS_ALPHA if alpha is None else alpha
        beta = servers_beta if beta is None else beta
        assert answers[i] == loop(trio, PROMPT, TOKENS, alpha, beta)[0], ASKED[i]


def test_chats_log_probabilities_and_the_models_name(served):
    server, trio, _ = served
    tokens, rows = loop(trio, CHAT, TOKENS, 0.5, 0.2)
    answer = server.client.chat.completions.create(
        model="steered", messages=[{"role": "user", "content": "w7 w8 w9"}],
        temperature=0, max_tokens=TOKENS, logprobs=True, top_logprobs=0,
        extra_body={
            "vllm_xargs": xargs_of(0.5, 0.2), "ignore_eos": True, "return_token_ids": True,
        },
    )  # fmt: skip
    (choice,) = answer.choices
    assert choice.token_ids == tokens and answer.usage.prompt_tokens == len(CHAT)
    wanted = [float(row.log_softmax(-1)[token]) for row, token in zip(rows, tokens)]
    assert [entry.logprob for entry in choice.logprobs.content] == pytest.approx(wanted, abs=1e-3)
    assert [model.id for model in server.client.models.list()] == ["steered"]
