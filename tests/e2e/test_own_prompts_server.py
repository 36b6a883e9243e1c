"""Own prompts over HTTP: a real `proxy-vllm serve` under Model Runner V2, against the loop.

The prompts that templates and texts give are written down here, so that the truth does not depend
on what renders them.
"""

import json
import threading
import urllib.error
import urllib.request

import openai
import pytest
import torch
from engines import V2, prompt_ids
from reference_loop import Trio, greedy
from test_server import KEY, Server

pytestmark = pytest.mark.skipif(not V2, reason="own prompts need Model Runner V2")

ALPHA = 1.5  # the server's
TOKENS = 4
BASE, EXPERT, ANTIEXPERT = prompt_ids([20, 50, 7], seed=600)
MESSAGES = [
    {"role": "system", "content": "w9 w10"},
    {"role": "user", "content": [{"type": "text", "text": "w11 w12 w13"}]},
]
# By `plain`, by the tokenizer's own ("system" is no token of its), and by the file below.
OWN_TEMPLATE = "{% for m in messages %}w20 {{ m.content }} {% endfor %}w21"
CHAT = {
    "base": [9, 10, 11, 12, 13],
    "expert": [0, 9, 10, 2, 11, 12, 13, 3],
    "antiexpert": [20, 9, 10, 20, 11, 12, 13, 21],
}


@pytest.fixture(scope="module")
def server(trio, tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    template = folder / "own.jinja"
    template.write_text(OWN_TEMPLATE)
    server = Server(
        trio, folder / "log", "--own-prompts", "--base-chat-template", "plain",
        "--expert-chat-template", "auto", "--antiexpert-chat-template", str(template),
        "--max-model-len", "128", "--max-num-seqs", "4", "--max-num-batched-tokens", "32",
        "--block-size", "32", "--enable-scale-out",
    )  # fmt: skip
    yield server
    server.stop()


@pytest.fixture(scope="module")
def models(trio):
    return Trio.load(trio["model"], trio["expert"], trio["antiexpert"], torch.float32)


def complete(server, base, stream=False, max_tokens=TOKENS, **xargs):
    usage = {"stream_options": {"include_usage": True}} if stream else {}
    return server.client.completions.create(
        model="steered", prompt=base, temperature=0, max_tokens=max_tokens, stream=stream,
        extra_body={"return_token_ids": True, "ignore_eos": True, "vllm_xargs": xargs}, **usage,
    )  # fmt: skip


def chat(server, stream=False, **extra):
    usage = {"stream_options": {"include_usage": True}} if stream else {}
    return server.client.chat.completions.create(
        model="steered", messages=MESSAGES, temperature=0, max_tokens=TOKENS, stream=stream,
        extra_body={"return_token_ids": True, "ignore_eos": True, **extra}, **usage,
    )  # fmt: skip


def streamed(chunks) -> tuple[list[int], object]:
    """Token ids of a stream, and the usage that ends it."""
    tokens, usage = [], None
    for chunk in chunks:
        for choice in chunk.choices:
            tokens += getattr(choice, "token_ids", None) or []
        usage = chunk.usage or usage
    return tokens, usage


def post(server, path: str, body: dict) -> dict:
    """What the server answers a request that the `openai` client does not know."""
    request = urllib.request.Request(
        server.url + path, json.dumps(body).encode(),
        {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"},
    )  # fmt: skip
    return json.loads(urllib.request.urlopen(request, timeout=120).read())


def words(ids: list[int]) -> str:
    return " ".join(f"w{i}" for i in ids)


def test_completions_side_by_side_each_with_its_own_prompts(server, models):
    """Text and ids, with and without own prompts, in one batch; counts are the base's."""
    asked = [
        ({"base": BASE, "expert": EXPERT}, {"proxy_expert_prompt": EXPERT}, 1.0),
        ({"base": BASE, "antiexpert": ANTIEXPERT}, {"proxy_antiexpert_prompt": ANTIEXPERT}, 0.5),
        (
            {"base": ANTIEXPERT, "expert": BASE, "antiexpert": EXPERT},
            {"proxy_expert_prompt": words(BASE), "proxy_antiexpert_prompt": words(EXPERT)},
            -1.0,
        ),
        (BASE, {}, 1.0),
    ]
    answers = {}

    def ask(i: int) -> None:
        prompt, named, alpha = asked[i]
        base = prompt["base"] if isinstance(prompt, dict) else prompt
        answers[i] = complete(server, base, proxy_alpha=alpha, **named)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, (prompt, _, alpha) in enumerate(asked):
        assert answers[i].choices[0].token_ids == greedy(models, prompt, TOKENS, alpha)[0], i
        base = prompt["base"] if isinstance(prompt, dict) else prompt
        usage = answers[i].usage
        assert (usage.prompt_tokens, usage.completion_tokens) == (len(base), TOKENS)


def test_a_stream_of_a_completion(server, models):
    chunks = complete(server, words(BASE), stream=True, proxy_expert_prompt=words(EXPERT))
    tokens, usage = streamed(chunks)
    want, _ = greedy(models, {"base": BASE, "expert": EXPERT}, TOKENS, ALPHA)
    assert tokens == want
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(BASE), TOKENS)


@pytest.mark.parametrize("stream", [False, True])
def test_chat_through_each_members_template(server, models, stream):
    answer = chat(server, stream=stream)
    if stream:
        tokens, usage = streamed(answer)
    else:
        tokens, usage = answer.choices[0].token_ids, answer.usage
    assert tokens == greedy(models, CHAT, TOKENS, ALPHA)[0]
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(CHAT["base"]), TOKENS)


def test_refused_requests_harm_nobody(server, models):
    outcome = {}

    def other() -> None:
        answer = complete(server, BASE, max_tokens=16, proxy_expert_prompt=EXPERT)
        outcome["tokens"] = answer.choices[0].token_ids

    thread = threading.Thread(target=other)
    thread.start()
    for named, message in (
        ({"proxy_expert_prompt": [5] * 128}, "the expert's prompt has 128 tokens"),
        ({"proxy_antiexpert_prompt": words([5] * 200)}, "the antiexpert's prompt has 200 tokens"),
        ({"proxy_expert_prompt": [111]}, "token id 111, but its vocabulary ends at 110"),
        ({"proxy_own_prompts": [1, [5], [5]]}, "not for requests to set"),
    ):
        with pytest.raises(openai.BadRequestError, match=message):
            complete(server, BASE, **named)
    for extra, message in (
        ({"prompt_logprobs": 1}, "prompt_logprobs with own prompts"),
        ({"chat_template_kwargs": {"tokenize": True}}, "the expert's chat template fails"),
    ):
        with pytest.raises(openai.BadRequestError, match=message):
            chat(server, **extra)
    thread.join()
    want, _ = greedy(models, {"base": BASE, "expert": EXPERT}, 16, ALPHA)
    assert outcome["tokens"] == want


def test_other_routes_stay_sane(server, models):
    """Counting tells the base's tokens; a rendered chat runs as the chat does; others say where."""
    counted = post(server, "/tokenize", {"model": "steered", "messages": MESSAGES})
    assert counted["tokens"] == CHAT["base"]

    body = {"model": "steered", "messages": MESSAGES, "temperature": 0, "max_tokens": TOKENS}
    rendered = post(server, "/v1/chat/completions/render", {**body, "ignore_eos": True})
    assert rendered["token_ids"] == CHAT["base"]
    answer = post(server, "/inference/v1/generate", rendered)
    assert answer["choices"][0]["token_ids"] == greedy(models, CHAT, TOKENS, ALPHA)[0]

    for path, body in (
        ("/v1/responses", {"model": "steered", "input": "w5"}),
        ("/v1/messages", {"model": "steered", "messages": MESSAGES[1:], "max_tokens": 4}),
    ):
        with pytest.raises(urllib.error.HTTPError) as refused:
            post(server, path, body)
        assert refused.value.code == 400
        message = json.loads(refused.value.read())["error"]["message"]
        assert "use /v1/chat/completions" in message
