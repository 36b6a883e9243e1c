"""HTTP admission: a request that the engine must not run is answered 400, and harms no other.

It is also where text for the expert and the antiexpert becomes token ids, and where messages of a
chat are rendered by the templates of those members, if the server has any.
"""

import asyncio
import json
from types import SimpleNamespace
from typing import Any

from proxy_vllm.config import ALPHA_KEY, ProxyConfig
from proxy_vllm.errors import UserError
from proxy_vllm.own_prompts.prompts import PROMPT_KEYS, RESOLVED_KEY

_XARGS = "vllm_xargs"
_OUR_KEYS = (ALPHA_KEY, *PROMPT_KEYS.values())
# Bodies that mention none of these pass without being parsed.
_MENTIONS = (b"proxy_alpha", *(key.encode() for key in (*PROMPT_KEYS.values(), RESOLVED_KEY)))
_CHAT = "/v1/chat/completions"
_COMPLETIONS = "/v1/completions"
# Other routes that generate from messages, and would give all models the base's prompt.
_WITHOUT_TEMPLATES = ("/v1/responses", "/v1/messages", "/v1/chat/completions/batch")


class AdmissionMiddleware:
    """ASGI middleware that checks and completes ``vllm_xargs`` of JSON requests.

    vLLM's server adds it by name (`--middleware`), so it runs in every API server process.
    """

    def __init__(self, app: Any) -> None:
        self.app = app
        # Both are the server's, made with the first request: its configuration is not there before.
        self._proxy: ProxyConfig | None = None
        self._prompts: Any = None

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        messages, body = [], bytearray()
        while True:
            message = await receive()
            messages.append(message)
            if message["type"] != "http.request":
                break
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        vllm_config = getattr(scope["app"].state, "vllm_config", None)
        if vllm_config is not None and messages[-1]["type"] == "http.request":
            try:
                changed = await self._admit(vllm_config, scope["path"], bytes(body))
            except UserError as error:
                await _refuse(send, str(error))
                return
            if changed is not None:
                messages = [{"type": "http.request", "body": changed, "more_body": False}]
                headers = [(k, v) for k, v in scope["headers"] if k != b"content-length"]
                scope = {**scope, "headers": [*headers, (b"content-length", b"%d" % len(changed))]}
        replay = iter(messages)

        async def receive_again() -> dict:
            message = next(replay, None)
            return message if message is not None else await receive()

        await self.app(scope, receive_again, send)

    async def _admit(self, vllm_config: Any, path: str, body: bytes) -> bytes | None:
        """Check a body; return it rewritten if prompts of the small members were put in."""
        if self._proxy is None:
            self._proxy = ProxyConfig.from_vllm_config(vllm_config)
        proxy = self._proxy
        templates = any(proxy.chat_template_of(role) is not None for role in PROMPT_KEYS)
        if templates and path.endswith(_WITHOUT_TEMPLATES):
            raise UserError(
                f"this server has chat templates of each model's own, which {_CHAT} applies and"
                f" {path} does not: use {_CHAT}"
            )
        chat = templates and path.endswith(_CHAT)
        if not chat and not any(key in body for key in _MENTIONS):
            return None
        try:
            # NaN and Infinity are not JSON, but Python's parser (and so vLLM's) takes them.
            request = json.loads(body)
        except ValueError:
            return None  # vLLM answers malformed JSON itself
        if not isinstance(request, dict):
            return None
        xargs = request.get(_XARGS)
        named = xargs if isinstance(xargs, dict) else {}
        for key in _OUR_KEYS:
            if key in request and key not in named:
                raise UserError(f'{key} belongs in {_XARGS}: {{"{key}": ...}}')
        proxy.alpha_of(named)
        if not chat and named.keys().isdisjoint((*PROMPT_KEYS.values(), RESOLVED_KEY)):
            return None
        if xargs is not None and not isinstance(xargs, dict):
            return None  # vLLM answers what is no object itself
        if self._prompts is None:
            from proxy_vllm.own_prompts.front_end import MemberPrompts

            self._prompts = MemberPrompts(vllm_config)
        # Templates and tokenizers take milliseconds, in which the server should go on.
        request[_XARGS] = await asyncio.to_thread(self._complete, path, request, named)
        return json.dumps(request).encode()

    def _complete(self, path: str, request: dict, named: dict) -> dict:
        """``vllm_xargs`` with the small members' prompts as token ids."""
        prompts = {}
        if path.endswith(_CHAT) and self._prompts.has_templates:
            messages = request.get("messages")
            if not isinstance(messages, list):
                return named  # vLLM answers
            prompts = self._prompts.of_chat(
                messages,
                add_generation_prompt=request.get("add_generation_prompt", True),
                continue_final_message=request.get("continue_final_message", False),
                tools=request.get("tools"),
                **(request.get("chat_template_kwargs") or {}),
            )
        elif not path.endswith((_CHAT, _COMPLETIONS)):
            raise UserError(f"{PROMPT_KEYS['expert']} is for {_COMPLETIONS} and {_CHAT}")
        many = request.get("prompt")
        if isinstance(many, list) and len(many) > 1 and not isinstance(many[0], int):
            raise UserError(
                f"{PROMPT_KEYS['expert']} belongs to one prompt, and this request has {len(many)}:"
                " send a request for each"
            )
        echo = request.get("echo") and request.get("logprobs") is not None
        params = SimpleNamespace(
            extra_args=named,
            prompt_logprobs=request.get("prompt_logprobs", 0 if echo else None),
        )
        return self._prompts.admit(params, prompts).extra_args or {}


async def _refuse(send: Any, message: str) -> None:
    """Answer in the form of OpenAI's API errors, as vLLM does."""
    param = next((key for key in _OUR_KEYS if key in message), _XARGS)
    error = {"message": message, "type": "BadRequestError", "param": param, "code": 400}
    body = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 400, "headers": headers})
    await send({"type": "http.response.body", "body": body})
