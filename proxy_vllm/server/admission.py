"""HTTP admission: a request that the engine must not run is answered 400, and harms no other.

It is also where text for the expert and the antiexpert becomes token ids, and where messages of a
chat are rendered by the templates of those members, if the server has any.
"""

import asyncio
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

from starlette.exceptions import HTTPException

from proxy_vllm.config import ALPHA_KEY, GUIDANCE_KEY, ProxyConfig
from proxy_vllm.errors import UserError
from proxy_vllm.explain.request import EXPLAIN_KEY, asked_top, check_engine
from proxy_vllm.member_alone import MEMBER_KEY
from proxy_vllm.own_prompts.prompts import (
    OWN_PROMPT_KEYS,
    PROMPT_KEYS,
    RESOLVED_KEY,
    check_tokenization,
    names_own_prompts,
)
from proxy_vllm.plausibility import BETA_KEY
from proxy_vllm.request_keys import OUR_KEYS, refuse_misspelled
from proxy_vllm.server.metrics import SCOPE_KEY
from proxy_vllm.spec_decode.admission import admit_every_parameter

_XARGS = "vllm_xargs"
# Bodies that mention none of these pass without being parsed; see _may_name_our_keys.
_ESCAPED_ASCII = re.compile(rb"\\u00[2-7]")
# The place of our keys is a mention too: a misspelled key there is refused by its right name.
_MENTIONS = (b"proxy_", GUIDANCE_KEY.encode(), _XARGS.encode(), b"extra_args")
# Other fields that a refusal may be about.
_FIELDS = (
    *("prompt_logprobs", "prompt_logprob_token_ids", "echo", "use_beam_search"),
    "truncate_prompt_tokens",
)

_CHAT = "/v1/chat/completions"
_COMPLETIONS = "/v1/completions"
# What vLLM calls rendering answers with the request that _TOKENS takes, `vllm_xargs` included.
_CHATS = (_CHAT, f"{_CHAT}/render")
_COMPLETES = (_COMPLETIONS, f"{_COMPLETIONS}/render")
_TOKENS = "/inference/v1/generate"
_EITHER = "/invocations"
# Routes that read prompts of each model's own.
_READ_PROMPTS = (*_CHATS, *_COMPLETES, _EITHER, _TOKENS)
_BATCH = f"{_CHAT}/batch"
_LOAD_ADAPTER = "/v1/load_lora_adapter"
# Other routes that read messages, and would give all models the base's prompt.
_WITHOUT_TEMPLATES = (
    _BATCH,
    *(f"{route}{tail}" for route in ("/v1/responses", "/v1/messages") for tail in ("", "/render")),
    *("/cohere/v2/chat", "/cohere/v2/chat/render"),
)

# Routes that read no extra arguments: the strength of a request would be lost on them.
_WITHOUT_XARGS = ("/generative_scoring", "/v1/systemone", "/cohere/v2/chat")


class AdmissionMiddleware:
    """ASGI middleware that checks and completes ``vllm_xargs`` of JSON requests.

    vLLM's server adds it by name (`--middleware`), so it runs in every API server process.
    """

    def __init__(self, app: Any) -> None:
        self.app = app
        # Both are the server's, made with the first request: its configuration is not there before.
        self._proxy: ProxyConfig | None = None
        self._prompts: Any = None
        self._adapter_rules: Any = None
        # Templates and tokenizers take milliseconds, in which the server should go on. One thread:
        # tokenizers are not for several at once.
        self._thread = ThreadPoolExecutor(1, "proxy-vllm-admission")

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        refusal: UserError | None = None
        replay: Iterator[dict] | None = None

        # Bodies are read when the application asks for one: it may answer by the headers alone, as
        # vLLM's authentication does, which is behind this middleware.
        async def receive_admitted() -> dict:
            nonlocal refusal, replay
            if replay is None and refusal is None:
                try:
                    replay = iter(await self._read(scope, receive))
                except UserError as error:
                    refusal = error
            if replay is None:
                raise HTTPException(400, str(refusal))
            message = next(replay, None)
            return message if message is not None else await receive()

        async def send_unless_refused(message: dict) -> None:
            if refusal is None:
                await send(message)

        try:
            await self.app(scope, receive_admitted, send_unless_refused)
        except HTTPException:
            if refusal is None:
                raise
        if refusal is not None:
            await _refuse(send, str(refusal))

    async def _read(self, scope: dict, receive: Any) -> list[dict]:
        """Messages that bring the admitted body; ``UserError`` if the request must not run."""
        messages, body = [], bytearray()
        while True:
            message = await receive()
            messages.append(message)
            if message["type"] != "http.request":
                return messages
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        state = scope["app"].state
        if not getattr(state, "vllm_config", None):
            return messages
        changed = await self._checked(scope, bytes(body))
        if changed is None:
            return messages
        sized = (b"content-length", b"transfer-encoding")
        headers = [(name, value) for name, value in scope["headers"] if name not in sized]
        scope["headers"][:] = [*headers, (b"content-length", b"%d" % len(changed))]
        return [{"type": "http.request", "body": changed, "more_body": False}]

    async def _checked(self, scope: dict, body: bytes) -> bytes | None:
        """Check a body; return it rewritten if prompts of the small members were put in."""
        state, path = scope["app"].state, scope["path"]
        if self._proxy is None:
            self._proxy = ProxyConfig.from_vllm_config(state.vllm_config)
            admit_every_parameter(state.engine_client)
            if self._proxy.remote_base is not None:
                from proxy_vllm.remote_base.answers import report_in_answers

                report_in_answers(state)
        proxy = self._proxy
        if path.endswith(_LOAD_ADAPTER) and state.vllm_config.lora_config is not None:
            await asyncio.get_running_loop().run_in_executor(
                self._thread, self._check_adapter, state.vllm_config, body
            )
            return None
        templates = any(proxy.chat_template_of(role) is not None for role in PROMPT_KEYS)
        if templates and path.endswith(_WITHOUT_TEMPLATES):
            raise UserError(
                f"this server has chat templates of each model's own, which {_CHAT} applies and"
                f" {path} does not: use {_CHAT}"
            )
        guided = proxy.guided and path.endswith((*_READ_PROMPTS, _BATCH))
        chat = templates and path.endswith((*_CHATS, _EITHER))
        if not chat and not guided and not _may_name_our_keys(body):
            return None
        try:
            # NaN and Infinity are not JSON, but Python's parser (and so vLLM's) takes them.
            request = json.loads(body)
        except (ValueError, RecursionError):
            return None  # vLLM answers malformed JSON itself
        if not isinstance(request, dict):
            return None
        # Where sampling parameters stand, and our keys among them.
        fields, place = request, _XARGS
        if path.endswith(_TOKENS):
            fields, place = request.get("sampling_params", {}), "extra_args"
            if not isinstance(fields, dict):
                return None
        xargs = fields.get(place)
        named = xargs if isinstance(xargs, dict) else {}
        if path.endswith(_WITHOUT_XARGS) and not {*named, *request}.isdisjoint(OUR_KEYS):
            raise UserError(f"{path} reads no {_XARGS}: it answers with the server's alpha")
        _check_places(request, fields, place, named)
        refuse_misspelled(named, place)
        scope[SCOPE_KEY] = proxy.member_of(named) or proxy.alpha_of(named)
        proxy.beta_of(named)
        explains = asked_top(named) is not None
        chat = chat and isinstance(request.get("messages"), list)
        own = [key for key in (*OWN_PROMPT_KEYS, RESOLVED_KEY) if key in named]
        prompts = chat or guided or bool(own)
        if xargs is not None and not isinstance(xargs, dict):
            return None  # vLLM answers what is no object itself
        ours = prompts or not named.keys().isdisjoint(OUR_KEYS)
        if request.get("use_beam_search") and ours:
            if proxy.guided:
                raise UserError(
                    "use_beam_search reads no negative prompt (--method cfg): leave it out, or ask"
                    " for n answers and keep the likeliest"
                )
            raise UserError(
                f"use_beam_search reads no {place}, and so neither {ALPHA_KEY}, {BETA_KEY},"
                f" {EXPLAIN_KEY}, {MEMBER_KEY} nor"
                " prompts of each model's own: leave it out, or ask for n answers and keep the"
                " likeliest"
            )
        if explains:
            self._let_explain(state, path, request)
        if not prompts:
            return None
        if own and not path.endswith(_READ_PROMPTS):
            raise UserError(f"{own[0]} is for {_COMPLETIONS} and {_CHAT}")
        completed = await asyncio.get_running_loop().run_in_executor(
            self._thread, self._complete, state, request, fields, named, chat
        )
        if completed is None:
            return None
        fields[place] = completed
        return json.dumps(request).encode()

    def _let_explain(self, state: Any, path: str, request: dict) -> None:
        """Prepare the server for a request that asks what steering does, or refuse it."""
        if not path.endswith((_CHAT, _COMPLETIONS, _EITHER)):
            raise UserError(
                f"{EXPLAIN_KEY}: {path} does not answer it; use {_COMPLETIONS}, {_CHAT}"
            )
        if request.get("include_reasoning") is False:
            raise UserError(f"{EXPLAIN_KEY} shows every token: leave include_reasoning out")
        check_engine(state.vllm_config)
        from proxy_vllm.explain.serving import let_answers_explain

        assert self._proxy is not None
        let_answers_explain(state, self._proxy)

    def _complete(
        self, state: Any, request: dict, fields: dict, named: dict, chat: bool
    ) -> dict | None:
        """What a request names, with prompts as token ids; None if vLLM will refuse the request.

        Args:
            request: the body.
            fields: where its sampling parameters stand.
            named: the extra arguments among them.
            chat: whether messages are to be rendered by the members' templates.
        """
        if self._prompts is None:
            from proxy_vllm.own_prompts.member_prompts import MemberPrompts

            self._prompts = MemberPrompts(state.vllm_config)
        prompts: dict[str, list[int]] = {}
        if chat:
            rendered = self._render(state.online_renderer, request)
            if rendered is None:
                return None
            prompts = rendered
        if chat or names_own_prompts(named):
            _check_base_prompt(request, named)
        reads_messages = "messages" in request
        # vLLM turns an echo of log-probabilities into prompt_logprobs, and any echo of a chat.
        echoed = request.get("echo") and (reads_messages or request.get("logprobs") is not None)
        params = SimpleNamespace(
            extra_args=named,
            prompt_logprobs=fields.get("prompt_logprobs"),
            echoed_logprobs=True if echoed else None,
            prompt_logprob_token_ids=fields.get("prompt_logprob_token_ids"),
        )
        # vLLM's defaults for the base's prompt.
        special = bool(request.get("add_special_tokens", not reads_messages))
        return self._prompts.add_to(params, prompts, special).extra_args

    def _check_adapter(self, vllm_config: Any, body: bytes) -> None:
        """Refuse an adapter that cannot run, where vLLM would answer with its own failure."""
        from proxy_vllm.adapters.settings import rules_of_engine

        try:
            request = json.loads(body)
            name, path = request["lora_name"], request["lora_path"]
        except (ValueError, RecursionError, TypeError, KeyError):
            return  # vLLM answers what is no such request
        if not isinstance(name, str) or not isinstance(path, str) or not name or not path:
            return
        if self._adapter_rules is None:
            self._adapter_rules = rules_of_engine(vllm_config)
        self._adapter_rules.check(name, path)

    def _render(self, renderer: Any, request: dict) -> dict[str, list[int]] | None:
        """Prompts of members with templates, told what vLLM tells the base's; None if it cannot.

        Args:
            renderer: vLLM's, of the server.
            request: the body; vLLM answers one that it does not take.
        """
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

        try:
            chat = ChatCompletionRequest.model_validate(json.loads(json.dumps(request)))
        except ValueError:
            return None
        tools = chat.tools
        if chat.tool_choice == "none" and renderer.exclude_tools_when_tool_choice_none:
            tools = None
        return self._prompts.of_chat(
            chat.messages,
            renderer.effective_chat_template_kwargs(chat),
            tools=tools and [tool.model_dump() for tool in tools],
            add_special_tokens=chat.add_special_tokens,
        )


def _may_name_our_keys(body: bytes) -> bool:
    """Whether a body is worth parsing: keys may be spelled with escapes, or in wide units."""
    if any(key in body for key in _MENTIONS):
        return True
    return _ESCAPED_ASCII.search(body) is not None or b"\0" in body[:4]


def _check_places(request: dict, fields: dict, place: str, named: dict) -> None:
    """Refuse our keys where nothing would read them."""
    homes = [home for home in (request, fields) if isinstance(home, dict)]
    nested = [value for home in homes for name, value in home.items() if name != place]
    for key in OUR_KEYS:
        if key in named:
            continue
        if any(isinstance(home, dict) and key in home for home in (*homes, *nested)):
            raise UserError(f'{key} belongs in {place}: {{"{key}": ...}}')


def _check_base_prompt(request: dict, named: dict) -> None:
    """Refuse what would treat the base's prompt otherwise than the others, which are ``named``."""
    prompt = request.get("prompt")
    if isinstance(prompt, list) and len(prompt) > 1 and not isinstance(prompt[0], int):
        key = next((key for key in OWN_PROMPT_KEYS if key in named), PROMPT_KEYS["expert"])
        raise UserError(
            f"{key} belongs to one prompt, and this request has {len(prompt)}:"
            " send a request for each"
        )
    check_tokenization(request)


async def _refuse(send: Any, message: str) -> None:
    """Answer in the form of OpenAI's API errors, as vLLM does."""
    # After the name of an unknown key come the right ones, which the request did not have.
    about = message.partition(" is not known: ")[0]
    found = [key for key in (*OUR_KEYS, *_FIELDS) if key in about]
    # A refusal begins with its culprit; of two keys there, one is the beginning of the other.
    param = min(found, key=lambda key: (about.index(key), -len(key)), default=_XARGS)
    error = {"message": message, "type": "BadRequestError", "param": param, "code": 400}
    body = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 400, "headers": headers})
    await send({"type": "http.response.body", "body": body})
