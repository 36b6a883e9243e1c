"""Classifier-free guidance over HTTP: a real `proxy-vllm serve --method cfg`, against the loop."""

import json
import threading
import urllib.error
import urllib.request

import openai
import pytest
import torch
from engines import V2, prompt_ids
from reference_loop import Trio, answer_logits, greedy
from test_server import KEY, Server
from tiny_models import make_model

pytestmark = pytest.mark.skipif(not V2, reason="guidance needs Model Runner V2")

TOKENS = 6
PROMPT, NEGATIVE = prompt_ids([20, 9], seed=97)
MESSAGES = [{"role": "user", "content": "w7 w8 w9"}]
CHAT = [2, 7, 8, 9, 3]  # by the tokenizer's template


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return make_model(tmp_path_factory.mktemp("cfg") / "base", seed=1)


@pytest.fixture(scope="module")
def server(base, tmp_path_factory):
    server = Server(
        {"model": base}, tmp_path_factory.mktemp("server") / "log",
        "--method", "cfg", "--alpha", "0.5", "--max-model-len", "128", "--max-num-seqs", "8",
        "--max-num-batched-tokens", "64", "--block-size", "32",
    )  # fmt: skip
    yield server
    server.stop()


@pytest.fixture(scope="module")
def trio(base) -> Trio:
    return Trio.load(base, base, base, torch.float32)


def words(ids: list[int]) -> str:
    return " ".join(f"w{i}" for i in ids)


def guided(trio, prompt, scale, negative, steps=TOKENS) -> list[int]:
    """What is right; without a negative prompt the last token stands alone."""
    prompts = {"base": prompt, "antiexpert": negative or prompt[-1:]}
    return greedy(trio, prompts, steps, scale - 1)[0]


def complete(server, scale=None, negative=None, **fields):
    named = {"guidance_scale": scale, "proxy_negative_prompt": negative}
    xargs = {key: value for key, value in named.items() if value is not None}
    return server.complete(
        prompt=fields.pop("prompt", PROMPT),
        extra={"vllm_xargs": xargs} if xargs else {},
        **{"max_tokens": TOKENS, **fields},
    )


def test_completions_side_by_side_each_with_its_own_guidance(server, trio):
    """Text and ids, whole and streamed, in one batch."""
    asked = [
        (scale, negative, as_text)
        for scale in (None, 1.0, 1.5, 3.0)
        for negative, as_text in ((None, False), (NEGATIVE, False), (NEGATIVE, True))
    ]
    answers = {}

    def ask(i: int) -> None:
        scale, negative, as_text = asked[i]
        own = words(negative) if as_text else negative
        prompt = words(PROMPT) if as_text else PROMPT
        answer = complete(server, scale, own, prompt=prompt, stream=bool(i % 2))
        chunks = answer if i % 2 else [answer]
        answers[i] = [token for chunk in chunks for token in chunk.choices[0].token_ids or []]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wanted = [guided(trio, PROMPT, scale or 1.5, negative) for scale, negative, _ in asked]
    assert [answers.get(i) for i in range(len(asked))] == wanted
    assert len({tuple(tokens) for tokens in wanted}) >= 3  # guidance matters to these answers


def test_several_answers_and_prompts_and_log_probabilities(server, trio):
    drawn = complete(server, 3, NEGATIVE, n=2, temperature=1, seed=3, logprobs=0)
    assert (drawn.usage.prompt_tokens, len(drawn.choices)) == (len(PROMPT), 2)
    for choice in drawn.choices:
        prompts = {"base": PROMPT, "antiexpert": NEGATIVE}
        rows = answer_logits(trio, prompts, choice.token_ids, 2.0).log_softmax(-1)
        wanted = [float(row[token]) for row, token in zip(rows, choice.token_ids)]
        assert choice.logprobs.token_logprobs == pytest.approx(wanted, abs=1e-3)
    # Each prompt of several is guided away from its own last token.
    two = complete(server, 3, prompt=[PROMPT, NEGATIVE])
    wanted = [guided(trio, prompt, 3, None) for prompt in (PROMPT, NEGATIVE)]
    assert [choice.token_ids for choice in two.choices] == wanted


@pytest.mark.parametrize("negative", [None, NEGATIVE, words(NEGATIVE)])
def test_chats(server, trio, negative):
    xargs = {"guidance_scale": 3, "proxy_negative_prompt": negative}
    request = {
        "model": "steered", "messages": MESSAGES, "temperature": 0, "max_tokens": TOKENS,
        "extra_body": {
            "return_token_ids": True, "ignore_eos": True,
            "vllm_xargs": {key: value for key, value in xargs.items() if value is not None},
        },
    }  # fmt: skip
    wanted = guided(trio, CHAT, 3, negative and NEGATIVE)
    chats = server.client.chat.completions
    assert chats.create(**request).choices[0].token_ids == wanted
    chunks = chats.create(**request, stream=True)
    choices = [choice for chunk in chunks for choice in chunk.choices]
    assert [t for choice in choices for t in getattr(choice, "token_ids", None) or []] == wanted


def test_the_longer_prompt_and_the_answer_meet_the_limit(server, trio):
    longest = [9] * 122
    answer = complete(server, 3, longest, max_tokens=50)
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].token_ids == guided(trio, PROMPT, 3, longest, steps=6)


COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"
NAMED = [
    ({"guidance_scale": "much"}, "guidance_scale", "must be a number"),
    ({"guidance_scale": float("nan")}, "guidance_scale", "must be a finite number"),
    ({"guidance_scale": 12}, "guidance_scale", "must lie in -9 .. 11"),
    ({"proxy_alpha": "much"}, "proxy_alpha", "must be a number"),
    ({"proxy_alpha": float("nan")}, "proxy_alpha", "must be a finite number"),
    ({"proxy_alpha": 10.5}, "proxy_alpha", "must lie in -10 .. 10"),
    ({"guidance_scale": 2, "proxy_alpha": 1}, "guidance_scale", "stands for proxy_alpha + 1"),
    ({"proxy_guidance_scale": 2}, "guidance_scale", "the name is guidance_scale"),
    ({"proxy_negative_prompt": ""}, "proxy_negative_prompt", "is empty"),
    ({"proxy_negative_prompt": 5}, "proxy_negative_prompt", "no list of token ids, and no text"),
    ({"proxy_negative_prompt": [111]}, "proxy_negative_prompt", "vocabulary ends at 110"),
    ({"proxy_negative_prompt": [5] * 128}, "proxy_negative_prompt", "has 128 tokens"),
    (
        {"proxy_negative_prompt": [5], "proxy_antiexpert_prompt": [5]},
        "proxy_negative_prompt",
        "are one prompt",
    ),
]
OTHERS = [
    (COMPLETIONS, {"prompt_logprobs": 1}, "prompt_logprobs", "reads two prompts"),
    (COMPLETIONS, {"echo": True, "logprobs": 1}, "echo", "asks for prompt_logprobs"),
    (CHATS, {"prompt_logprobs": 1}, "prompt_logprobs", "leave it out"),
    (f"{CHATS}/batch", {"prompt_logprobs": 1}, "prompt_logprobs", "leave it out"),
    (COMPLETIONS, {"use_beam_search": True, "n": 2}, "use_beam_search", "no negative prompt"),
    (CHATS, {"use_beam_search": True, "n": 2}, "use_beam_search", "no negative prompt"),
    (
        COMPLETIONS,
        {"prompt": [[5], [6]], "vllm_xargs": {"proxy_negative_prompt": "w5"}},
        "proxy_negative_prompt",
        "this request has 2",
    ),
    (
        "/v1/responses",
        {"input": "w5", "vllm_xargs": {"proxy_negative_prompt": "w5"}},
        "proxy_negative_prompt",
        "is for /v1/completions and",
    ),
    ("/v1/responses", {"input": "w5", "guidance_scale": 2}, "guidance_scale", "in vllm_xargs"),
]


def refusal(server, path: str, body: dict) -> dict:
    """Error of a request that the `openai` client might not send; NaN goes as many send it."""
    request = urllib.request.Request(
        server.url + path, json.dumps({"model": "steered", **body}).encode(),
        {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"},
    )  # fmt: skip
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=60)
    error = json.loads(refused.value.read())["error"]
    assert refused.value.code == error["code"] == 400, error
    return error


def test_refused_requests_name_the_culprit_and_harm_nobody(server, trio):
    outcome = {}

    def other() -> None:
        answer = complete(server, 3, NEGATIVE, max_tokens=40)
        outcome["tokens"] = answer.choices[0].token_ids

    thread = threading.Thread(target=other)
    thread.start()
    asked = [
        *((COMPLETIONS, {"prompt": [5], "vllm_xargs": named}, *error) for named, *error in NAMED),
        *OTHERS,
    ]
    for path, body, culprit, message in asked:
        talk = [MESSAGES] if path.endswith("/batch") else MESSAGES
        prompt = {"messages": talk} if path.startswith(CHATS) else {"prompt": "w5"}
        error = refusal(server, path, {**prompt, **body})
        assert error["param"] == culprit and message in error["message"], (body, error)
    with pytest.raises(openai.BadRequestError, match="the expert is the base"):
        server.complete(extra={"vllm_xargs": {"proxy_expert_prompt": [5]}})
    thread.join()
    assert outcome["tokens"] == guided(trio, PROMPT, 3, NEGATIVE, steps=40)
    # No metrics of a base elsewhere, of which this server has none.
    page = urllib.request.urlopen(f"{server.url}/metrics").read().decode()
    assert "proxy_vllm:requests_total" in page and "remote_base" not in page
