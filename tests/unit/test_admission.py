"""The HTTP middleware as an ASGI application, in front of one that records what reaches it."""

import asyncio
import itertools
import json
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
from vllm import AsyncEngineArgs
from vllm.entrypoints.launchers.cli_args import resolve_default_chat_template_kwargs
from vllm.renderers import renderer_from_config
from vllm.renderers.online_renderer import OnlineRenderer
from vllm.utils.argparse_utils import FlexibleArgumentParser

from proxy_vllm.cli.arguments import apply_to_namespace
from proxy_vllm.cli.serve import ProxyServeSubcommand
from proxy_vllm.server.admission import AdmissionMiddleware

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
TOKENS = "/inference/v1/generate"
MESSAGES = [
    {"role": "system", "content": "w9"},
    {"role": "user", "content": [{"type": "text", "text": "w11 w12"}]},
]


def serve_parser() -> FlexibleArgumentParser:
    parser = FlexibleArgumentParser()
    ProxyServeSubcommand().subparser_init(parser.add_subparsers())
    return parser


class Server:
    """The middleware, and what an application behind it reads."""

    def __init__(self, trio: dict[str, str], options: str = "", base_alone: bool = False) -> None:
        members = [trio["model"], "--expert", trio["expert"], "--antiexpert", trio["antiexpert"]]
        members = members[:1] if base_alone else members
        small = ["--max-model-len", "64", "--dtype", "float32"]
        args = serve_parser().parse_args(["serve", *members, *small, *shlex.split(options)])
        apply_to_namespace(args)
        config = AsyncEngineArgs.from_cli_args(args).create_engine_config()
        renderer = OnlineRenderer(
            config.model_config,
            renderer_from_config(config),
            request_logger=None,
            chat_template=args.chat_template,
            chat_template_content_format="auto",
            exclude_tools_when_tool_choice_none=args.exclude_tools_when_tool_choice_none,
            default_chat_template_kwargs=resolve_default_chat_template_kwargs(args),
        )
        engine = SimpleNamespace(vllm_config=config, input_processor=SimpleNamespace())
        self.state = SimpleNamespace(
            vllm_config=config, online_renderer=renderer, engine_client=engine
        )
        self.middleware = AdmissionMiddleware(self._app)

    async def _app(self, scope, receive, send):
        self.scope, self.received = scope, []
        while True:
            self.received.append(await receive())
            if not self.received[-1].get("more_body"):
                break
        # An application that answers at length goes on listening for the client to leave.
        self.after = await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    def post(self, path: str, chunks, headers=(), method="POST", end=True) -> tuple[int, dict]:
        """Send a body in chunks; the status and what was answered."""
        sent, self.received = [], None
        events = [{"type": "http.request", "body": c, "more_body": True} for c in chunks]
        if end:
            events[-1]["more_body"] = False
        queue = itertools.chain(events, itertools.repeat({"type": "http.disconnect"}))

        async def receive():
            return next(queue)

        async def send(message):
            sent.append(message)

        app = SimpleNamespace(state=self.state)
        scope = {"type": "http", "method": method, "path": path, "headers": list(headers)}
        asyncio.run(self.middleware({**scope, "app": app}, receive, send))
        body = b"".join(m.get("body", b"") for m in sent)
        return sent[0]["status"], json.loads(body)

    def passed(self, path: str, request: dict) -> dict:
        """The body that reaches the application; its length is the one that the headers name."""
        status, answer = self.post(path, [json.dumps(request).encode()])
        assert status == 200, answer
        (message,) = self.received
        sizes = [int(v) for name, v in self.scope["headers"] if name == b"content-length"]
        assert sizes in ([], [len(message["body"])])
        return json.loads(message["body"])

    def refused(self, path: str, request) -> dict:
        body = request if isinstance(request, bytes) else json.dumps(request).encode()
        status, answer = self.post(path, [body])
        assert status == 400 and not self.received
        assert "\n" not in answer["error"]["message"]
        return answer["error"]


@pytest.fixture(scope="module")
def v2():
    """Own prompts want Model Runner V2; no engine starts here, so its name is enough."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vllm.config.vllm.HAS_TRITON", True)
        patch.setattr("proxy_vllm.engine_args.cpu_runner", lambda: "v2")
        patch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
        yield


@pytest.fixture(scope="module")
def plain(trio, v2):
    return Server(trio, "--own-prompts")


@pytest.fixture(scope="module")
def templated(trio, v2, tmp_path_factory):
    """The antiexpert's template shows what it is told; every word that is no token reads as 0."""
    template = tmp_path_factory.mktemp("template") / "own.jinja"
    template.write_text(
        "{% for m in messages %}w20 {{ m.content }} {% endfor %}"
        "{% if add_generation_prompt %}w21{% endif %}{% if mood %} {{ mood }}{% endif %}"
        "{% for tool in tools or [] %} {{ tool.function.name }}{% endfor %}"
    )
    return Server(
        trio,
        f"--expert-chat-template auto --antiexpert-chat-template {template}"
        """ --default-chat-template-kwargs '{"mood": "w30"}'""",
    )


def xargs(**named) -> dict:
    return {"vllm_xargs": named}


@pytest.mark.parametrize(
    "name", ["proxyalpha", "proxy-alpha", "alpha", "Proxy_Alpha", "proxy_alhpa"]
)
def test_a_misspelled_key_is_refused_by_its_right_name(plain, name):
    error = plain.refused(COMPLETIONS, {"prompt": "w5", **xargs(**{name: 0.5})})
    assert error["message"] == f"{name} in vllm_xargs is not known: the name is proxy_alpha"
    tokens = {"token_ids": [5], "sampling_params": {"extra_args": {name: 0.5}}}
    assert "the name is proxy_alpha" in plain.refused(TOKENS, tokens)["message"]
    error = plain.refused(CHAT, {"messages": MESSAGES, **xargs(expert_prompt=[1])})
    assert "the name is proxy_expert_prompt" in error["message"]
    for name, right in (
        ("cfg_scale", "the name is guidance_scale"),
        ("proxy_strength", "there are proxy_alpha, "),
    ):
        error = plain.refused(COMPLETIONS, {"prompt": "w5", **xargs(**{name: 2})})
        assert error["message"].startswith(f"{name} in vllm_xargs is not known: {right}")
        assert error["param"] == "vllm_xargs"
    # Another's key is not ours to refuse.
    plain.passed(COMPLETIONS, {"prompt": "w5", **xargs(alphabet="abc", kv_transfer=1)})


def test_prompts_of_a_completion_become_ids(plain):
    sent = {
        "model": "m",
        "prompt": "w5 w6",
        **xargs(proxy_expert_prompt="w7 w8 user", proxy_antiexpert_prompt=[9, 10], proxy_alpha=0.5),
    }
    assert plain.passed(COMPLETIONS, sent) == {
        **sent,
        **xargs(proxy_expert_prompt=[7, 8, 2], proxy_antiexpert_prompt=[9, 10], proxy_alpha=0.5),
    }
    one = plain.passed(COMPLETIONS, {"prompt": ["w5"], **xargs(proxy_expert_prompt="w7")})
    assert one["vllm_xargs"] == {"proxy_expert_prompt": [7]}
    ids = plain.passed(COMPLETIONS, {"prompt": [5, 6], **xargs(proxy_antiexpert_prompt="w7")})
    assert ids["vllm_xargs"] == {"proxy_antiexpert_prompt": [7]}


def test_a_chat_may_name_them_on_a_server_without_templates(plain):
    sent = {"messages": MESSAGES, **xargs(proxy_expert_prompt="w7")}
    assert plain.passed(CHAT, sent)["vllm_xargs"] == {"proxy_expert_prompt": [7]}


def test_special_tokens_as_for_the_base(plain):
    """A tokenizer that begins texts with token 1; completions take it by default, chats do not."""
    from tokenizers.processors import TemplateProcessing

    prompts = plain.middleware._prompts
    tokenizer = prompts.tokenizer("expert")
    before = tokenizer.backend_tokenizer.post_processor
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", 1)]
    )
    try:
        for path, fields, want in (
            (COMPLETIONS, {"prompt": "w5"}, [1, 7]),
            (COMPLETIONS, {"prompt": "w5", "add_special_tokens": False}, [7]),
            (CHAT, {"messages": MESSAGES}, [7]),
            (CHAT, {"messages": MESSAGES, "add_special_tokens": True}, [1, 7]),
        ):
            passed = plain.passed(path, {**fields, **xargs(proxy_expert_prompt="w7")})
            assert passed["vllm_xargs"] == {"proxy_expert_prompt": want}
    finally:
        tokenizer.backend_tokenizer.post_processor = before


@pytest.mark.parametrize("path", [CHAT, f"{CHAT}/render", "/invocations"])
def test_chats_are_rendered_by_each_members_template(templated, path):
    sent = {"messages": MESSAGES, **xargs(proxy_alpha=0.5)}
    assert templated.passed(path, sent) == {
        **sent,
        **xargs(
            proxy_alpha=0.5,
            proxy_expert_prompt=[0, 9, 2, 11, 12, 3],  # "system" is no token
            proxy_antiexpert_prompt=[20, 9, 20, 11, 12, 21, 30],
        ),
    }


def test_templates_are_told_what_the_bases_is_told(templated):
    tool = {"type": "function", "function": {"name": "w40", "parameters": {}}}
    sent = {
        "messages": [*MESSAGES, {"role": "assistant", "content": "w13"}],
        "add_generation_prompt": False,
        "continue_final_message": True,
        "chat_template_kwargs": {"mood": "w31", "add_generation_prompt": True},
        "tools": [tool],
        "tool_choice": "auto",
    }
    got = templated.passed(CHAT, sent)["vllm_xargs"]
    # An open last message ends the text, whatever a template writes after it.
    assert got == {
        "proxy_expert_prompt": [0, 9, 2, 11, 12, 3, 13],
        "proxy_antiexpert_prompt": [20, 9, 20, 11, 12, 20, 13],
    }
    sent.update(continue_final_message=False)
    got = templated.passed(CHAT, sent)["vllm_xargs"]["proxy_antiexpert_prompt"]
    assert got == [20, 9, 20, 11, 12, 20, 13, 31, 40]


def test_what_a_request_names_comes_before_a_template(templated):
    got = templated.passed(CHAT, {"messages": MESSAGES, **xargs(proxy_antiexpert_prompt=[50])})
    assert got["vllm_xargs"]["proxy_antiexpert_prompt"] == [50]
    assert got["vllm_xargs"]["proxy_expert_prompt"] == [0, 9, 2, 11, 12, 3]


def test_tokens_in_and_out_have_them_among_the_sampling_parameters(plain):
    extra = {"proxy_expert_prompt": "w7 w8", "proxy_alpha": 1}
    sent = {"token_ids": [5], "sampling_params": {"max_tokens": 4, "extra_args": extra}}
    got = plain.passed(TOKENS, sent)
    extra["proxy_expert_prompt"] = [7, 8]
    assert got == sent
    extra["proxy_alpha"] = 1000
    assert "proxy_alpha is 1000" in plain.refused(TOKENS, sent)["message"]
    extra.update(proxy_alpha=1, proxy_expert_prompt=[111])
    assert "token id 111" in plain.refused(TOKENS, sent)["message"]
    extra["proxy_expert_prompt"] = [7]
    sent["sampling_params"]["prompt_logprobs"] = 1
    assert "prompt_logprobs" in plain.refused(TOKENS, sent)["message"]


UNTOUCHED = [
    (COMPLETIONS, b'{"prompt":  "w5", "n" :1}'),
    (COMPLETIONS, b'{"prompt": "w5",  "vllm_xargs": {"proxy_alpha" : 0.5}}'),
    (COMPLETIONS, b'{"prompt": "what is proxy_expert_prompt ?"}'),
    (COMPLETIONS, b'{"prompt": "proxy_alpha", "use_beam_search": true}'),
    (CHAT, b'{"messages": [ ]}'),
    (TOKENS, b'{"token_ids": [5], "sampling_params": {"extra_args": {"mine": "proxy_alpha"}}}'),
    (TOKENS, b'{"token_ids": [5], "sampling_params": "proxy_alpha"}'),
    ("/tokenize", b'{"prompt": "proxy_expert_prompt"}'),
    (COMPLETIONS, b'{"prompt": "proxy_expert_prompt'),
    (COMPLETIONS, b"[" * 100_000 + b"proxy_alpha"),
    (COMPLETIONS, b'["proxy_alpha"]'),
    (COMPLETIONS, b'{"prompt": "w5", "vllm_xargs": ["proxy_expert_prompt"]}'),
    ("/v1/load_lora_adapter", b"\xff\x00proxy_alpha"),
    (COMPLETIONS, b""),
]


@pytest.mark.parametrize("path, body", UNTOUCHED)
def test_what_is_not_ours_passes_byte_for_byte(plain, path, body):
    assert plain.post(path, [body])[0] == 200
    assert plain.received == [{"type": "http.request", "body": body, "more_body": False}]


@pytest.mark.parametrize(
    "path, body",
    [
        (CHAT, b'{"messages": "w5"}'),
        (CHAT, b'{"messages": [{"role": 5}]}'),
        (CHAT, b'{"messages": [{"role": "user", "content": "w5"}], "temperature": "hot"}'),
        (CHAT, b'{"messages": [{"role": "user", "content": "w5"}], "chat_template_kwargs": [1]}'),
        ("/tokenize", b'{"messages": [{"role": "user", "content": "w5"}]}'),
        ("/v1/messages/count_tokens", b'{"messages": [{"role": "user", "content": "w5"}]}'),
        (COMPLETIONS, b'{"prompt": "w5"}'),
    ],
)
def test_vllm_answers_what_it_does_not_take(templated, path, body):
    assert templated.post(path, [body])[0] == 200
    assert templated.received[0]["body"] == body


def test_other_methods_and_lifespan_are_not_read(plain):
    assert plain.post(COMPLETIONS, [b'{"proxy_alpha": 1}'], method="PUT")[0] == 200
    assert plain.received[0]["body"] == b'{"proxy_alpha": 1}'


def test_chunks_are_read_to_their_end_and_sent_on(plain):
    body = json.dumps({"prompt": "w5", **xargs(proxy_expert_prompt="w7")}).encode()
    headers = [(b"transfer-encoding", b"chunked"), (b"content-type", b"application/json")]
    pieces = [body[:9], b"", body[9:40], body[40:]]
    assert plain.post(COMPLETIONS, pieces, headers)[0] == 200
    (message,) = plain.received
    assert json.loads(message["body"])["vllm_xargs"] == {"proxy_expert_prompt": [7]}
    size = (b"content-length", str(len(message["body"])).encode())
    assert plain.scope["headers"] == [headers[1], size]
    assert plain.after == {"type": "http.disconnect"}
    untouched = [b'{"prompt"', b': "w5"}']
    assert plain.post(COMPLETIONS, untouched, headers)[0] == 200
    assert [m["body"] for m in plain.received] == untouched
    assert plain.scope["headers"] == headers


def test_a_client_that_leaves_within_its_body(plain):
    """The application learns of it as it would have without us."""
    plain.post(COMPLETIONS, [b'{"proxy_alpha": 1000'], end=False)
    kinds = [m["type"] for m in plain.received]
    assert kinds == ["http.request", "http.disconnect"]


TOO_MANY = "belongs to one prompt, and this request has 2"
REFUSALS = [
    (COMPLETIONS, {"prompt": ["w5", "w6"], **xargs(proxy_expert_prompt="w7")}, TOO_MANY),
    (COMPLETIONS, {"prompt": [[5], [6]], **xargs(proxy_expert_prompt="w7")}, TOO_MANY),
    ("/v1/responses", xargs(proxy_expert_prompt="w7"), f"is for {COMPLETIONS} and {CHAT}"),
    ("/v1/messages", xargs(proxy_antiexpert_prompt=[7]), f"is for {COMPLETIONS} and {CHAT}"),
    (COMPLETIONS, xargs(proxy_expert_prompt=[]), "the expert's prompt is empty"),
    (COMPLETIONS, xargs(proxy_expert_prompt=""), "the expert's prompt is empty"),
    (COMPLETIONS, xargs(proxy_expert_prompt=3.5), "the expert's prompt is no list of token ids"),
    (COMPLETIONS, xargs(proxy_antiexpert_prompt=[5, -1]), "the antiexpert's prompt is no list"),
    (COMPLETIONS, xargs(proxy_expert_prompt=[5, True]), "the expert's prompt is no list"),
    (COMPLETIONS, xargs(proxy_expert_prompt=["w5", 6]), "the expert's prompt is no list"),
    (COMPLETIONS, xargs(proxy_antiexpert_prompt=[111]), "the antiexpert's prompt holds token id"),
    (COMPLETIONS, xargs(proxy_expert_prompt=[10**30]), "the expert's prompt holds token id 10000"),
    (COMPLETIONS, xargs(proxy_expert_prompt="w5 " * 64), "the expert's prompt has 64 tokens"),
    (COMPLETIONS, xargs(proxy_antiexpert_prompt=[5] * 70), "the antiexpert's prompt has 70"),
    (COMPLETIONS, xargs(proxy_expert_prompt="w5 \ud800"), "no text that can be encoded"),
    (COMPLETIONS, {"prompt_logprobs": 0, **xargs(proxy_expert_prompt="w7")}, "prompt_logprobs"),
    (
        COMPLETIONS,
        {"echo": True, "logprobs": 0, **xargs(proxy_expert_prompt="w7")},
        "prompt_logprobs",
    ),
    (
        COMPLETIONS,
        {"echo": True, "logprobs": 1, "prompt_logprobs": None, **xargs(proxy_expert_prompt="w7")},
        "prompt_logprobs",
    ),
    # vLLM asks for log-probabilities of the prompt whenever a chat is echoed.
    (CHAT, {"messages": MESSAGES, "echo": True, **xargs(proxy_expert_prompt=[7])}, "prompt_logp"),
    (COMPLETIONS, {"truncate_prompt_tokens": 3, **xargs(proxy_expert_prompt="w7")}, "truncate_"),
    (COMPLETIONS, {"use_beam_search": True, **xargs(proxy_expert_prompt="w7")}, "use_beam_search"),
    (COMPLETIONS, {"use_beam_search": True, **xargs(proxy_alpha=0.5)}, "use_beam_search"),
    (COMPLETIONS, xargs(proxy_own_prompts=[1, [2], [3]]), "is not for requests to set"),
    (COMPLETIONS, xargs(proxy_alpha=11), "proxy_alpha is 11"),
    (COMPLETIONS, xargs(proxy_beta=1.5), "proxy_beta is 1.5: it must be a number from 0"),
    (COMPLETIONS, {"proxy_beta": 0.1}, "proxy_beta belongs in vllm_xargs"),
    (COMPLETIONS, xargs(beta=0.1), "the name is proxy_beta"),
    (COMPLETIONS, {"use_beam_search": True, **xargs(proxy_beta=0.1)}, "use_beam_search"),
    (COMPLETIONS, xargs(proxy_member="tuned"), "there are base, expert, antiexpert"),
    (COMPLETIONS, xargs(proxy_member="expert", proxy_alpha=1), "proxy_alpha: proxy_member asks"),
    (COMPLETIONS, xargs(proxy_member="expert", proxy_explain=1), "proxy_explain: proxy_member"),
    (COMPLETIONS, {"proxy_member": "expert"}, "proxy_member belongs in vllm_xargs"),
    (CHAT, xargs(member="expert"), "the name is proxy_member"),
    (COMPLETIONS, {"proxy_alpha": 1}, 'proxy_alpha belongs in vllm_xargs: {"proxy_alpha": ...}'),
    (COMPLETIONS, {"proxy_expert_prompt": "w5"}, "proxy_expert_prompt belongs in vllm_xargs"),
    (TOKENS, {"proxy_alpha": 1, "sampling_params": {}}, "proxy_alpha belongs in extra_args"),
    (TOKENS, {"sampling_params": {"proxy_alpha": 1}}, "proxy_alpha belongs in extra_args"),
    (COMPLETIONS, {"extra_args": {"proxy_alpha": 1}}, "proxy_alpha belongs in vllm_xargs"),
    (CHAT, {"extra_body": {"proxy_expert_prompt": "w5"}}, "belongs in vllm_xargs"),
    ("/generative_scoring", xargs(proxy_alpha=1), "/generative_scoring reads no vllm_xargs"),
    (COMPLETIONS, xargs(proxy_explain="yes"), "proxy_explain is 'yes': it must be true or false"),
    (COMPLETIONS, xargs(proxy_explain=True, proxy_explain_top=21), "proxy_explain_top is 21"),
    (COMPLETIONS, xargs(proxy_explain_top=3), "proxy_explain_top is nothing without proxy_explain"),
    (COMPLETIONS, xargs(proxy_explain_alone=True), "is not for requests to set"),
    (COMPLETIONS, xargs(explain=True), "the name is proxy_explain"),
    (COMPLETIONS, {"proxy_explain": True}, "proxy_explain belongs in vllm_xargs"),
    (COMPLETIONS, {"use_beam_search": True, **xargs(proxy_explain=True)}, "use_beam_search"),
    (CHAT, {"include_reasoning": False, **xargs(proxy_explain=True)}, "include_reasoning"),
    (f"{CHAT}/batch", xargs(proxy_explain=True), "/v1/chat/completions/batch does not answer it"),
    (TOKENS, {"sampling_params": {"extra_args": {"proxy_explain": True}}}, "does not answer it"),
    ("/v1/systemone", {"proxy_alpha": 1}, "/v1/systemone reads no vllm_xargs"),
]


@pytest.mark.parametrize("path, request_, message", REFUSALS)
def test_refusals(plain, path, request_, message):
    error = plain.refused(path, {"prompt": "w5", **request_} if path == COMPLETIONS else request_)
    assert message in error["message"]
    assert (error["type"], error["code"]) == ("BadRequestError", 400)
    assert error["param"] in (
        *("proxy_alpha", "proxy_beta", "proxy_expert_prompt", "proxy_antiexpert_prompt"),
        *("proxy_explain", "proxy_explain_top", "proxy_member", "vllm_xargs"),
        *("use_beam_search", "echo"),
        *("prompt_logprobs", "prompt_logprob_token_ids", "truncate_prompt_tokens"),
    )


@pytest.mark.parametrize(
    "body",
    [
        rb'{"prompt": "w5", "vllm_xargs": {"proxy\u005falpha": 11}}',
        rb'{"prompt": "w5", "vllm_xargs": {"\u0070roxy_alpha": 11}}',
        '{"vllm_xargs": {"proxy_alpha": 11}}'.encode("utf-16"),
        '{"vllm_xargs": {"proxy_alpha": 11}}'.encode("utf-16-be"),
        '{"vllm_xargs": {"proxy_alpha": 11}}'.encode("utf-32"),
        '{"vllm_xargs": {"proxy_alpha": 11}}'.encode("utf-8-sig"),
        b'{"vllm_xargs": {"proxy_alpha": 1}, "vllm_xargs": {"proxy_alpha": 11}}',
    ],
)
def test_no_spelling_of_a_key_passes_unseen(plain, body):
    """Whatever Python's parser reads, since vLLM's server reads bodies with it."""
    assert json.loads(body)["vllm_xargs"] == {"proxy_alpha": 11}
    assert "proxy_alpha is 11" in plain.refused(COMPLETIONS, body)["message"]


def test_a_body_that_the_application_does_not_ask_for_is_not_read(plain):
    """As when vLLM's authentication, which is behind, answers that the key is wrong."""
    sent = []

    async def unauthorized(scope, receive, send):
        await send({"type": "http.response.start", "status": 401, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    async def receive():
        raise AssertionError("the body was read")

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": COMPLETIONS, "headers": []}
    app = SimpleNamespace(state=plain.state)
    asyncio.run(AdmissionMiddleware(unauthorized)({**scope, "app": app}, receive, send))
    assert sent[0]["status"] == 401 and len(sent) == 2


@pytest.mark.parametrize(
    "path, fields, message",
    [
        ("/v1/responses", {"input": "w5"}, f"use {CHAT}"),
        ("/v1/messages", {}, f"use {CHAT}"),
        (f"{CHAT}/batch", {}, f"use {CHAT}"),
        (CHAT, {"use_beam_search": True}, "use_beam_search"),
        (CHAT, {"prompt_logprobs": 1}, "prompt_logprobs"),
        (CHAT, {"truncate_prompt_tokens": 3}, "truncate_prompt_tokens"),
        (CHAT, {"chat_template_kwargs": {"tokenize": True}}, "the expert's chat template fails"),
    ],
)
def test_refusals_of_a_server_with_templates(templated, path, fields, message):
    assert message in templated.refused(path, {"messages": MESSAGES, **fields})["message"]


def test_templates_read_text_only_and_must_leave_room(templated):
    image = [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/none.png"}}]
    error = templated.refused(CHAT, {"messages": [{"role": "user", "content": image}]})
    assert "read text only" in error["message"]
    # 61 tokens by the base's template, 62 by the antiexpert's: of 64, both leave room.
    fits = [{"role": "user", "content": "w5 " * 59}]
    got = templated.passed(CHAT, {"messages": fits})["vllm_xargs"]
    assert [len(p) for p in got.values()] == [61, 62]
    error = templated.refused(CHAT, {"messages": [{"role": "user", "content": "w5 " * 61}]})
    assert "the antiexpert's prompt has 64 tokens" in error["message"]


def test_negative_prompts(trio, v2, plain):
    server = Server(trio, "--method cfg", base_alone=True)
    asked = {"guidance_scale": 2, "proxy_negative_prompt": "w6 w7"}
    for path, body in ((COMPLETIONS, {"prompt": "w5"}), (CHAT, {"messages": MESSAGES})):
        got = server.passed(path, {**body, **xargs(**asked)})["vllm_xargs"]
        assert got == {"guidance_scale": 2, "proxy_antiexpert_prompt": [6, 7]}
        assert "proxy_antiexpert_prompt" not in server.passed(path, body).get("vllm_xargs", {})
        beams = server.refused(path, {**body, "use_beam_search": True})
        assert "use_beam_search reads no" in beams["message"]
    both = server.refused(COMPLETIONS, {"prompt": "w5", **xargs(guidance_scale=2, proxy_alpha=1)})
    assert "it stands for proxy_alpha + 1" in both["message"]
    for field in ("echo", "prompt_logprobs", "use_beam_search"):
        for path in (CHAT, f"{CHAT}/batch"):  # an echo asks for prompt_logprobs in every chat
            error = server.refused(path, {"messages": MESSAGES, field: 1})
            assert error["param"] == field, error
    for key, value in asked.items():
        refused = plain.refused(COMPLETIONS, {"prompt": "w5", **xargs(**{key: value})})
        assert f"{key}" in refused["message"] and "--method cfg" in refused["message"]


def test_an_engine_that_was_not_set_up_for_them_says_so(trio, v2):
    server = Server(trio)
    error = server.refused(COMPLETIONS, {"prompt": "w5", **xargs(proxy_expert_prompt="w7")})
    assert "--own-prompts" in error["message"]
    assert server.passed(COMPLETIONS, {"prompt": "w5", **xargs(proxy_alpha=1)})


def test_the_v1_runner_names_the_way_out(trio, monkeypatch):
    monkeypatch.setattr("proxy_vllm.engine_args.cpu_runner", lambda: "v1")
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    server = Server(trio)
    error = server.refused(COMPLETIONS, {"prompt": "w5", **xargs(proxy_expert_prompt="w7")})
    assert "PROXY_VLLM_CPU_RUNNER=v2" in error["message"]


def test_the_documented_server_has_options_that_exist():
    docs = (Path(__file__).resolve().parents[2] / "docs/own_prompts.md").read_text()
    command = docs.split("proxy-vllm serve ", 1)[1].split("```", 1)[0].replace("\\\n", " ")
    args = serve_parser().parse_args(["serve", *shlex.split(command)])
    assert args.expert_chat_template == "llama-2-paper"
    assert args.default_chat_template_kwargs == {"response_prefix": "Answer:"}
