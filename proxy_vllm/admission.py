"""HTTP admission: a request that the engine must not run is answered 400, and harms no other."""

import json
from typing import Any

from proxy_vllm.config import ALPHA_KEY, ProxyConfig
from proxy_vllm.errors import UserError

_XARGS = "vllm_xargs"


class AdmissionMiddleware:
    """ASGI middleware that checks ``vllm_xargs.proxy_alpha`` of JSON requests.

    vLLM's server adds it by name (`--middleware`), so it runs in every API server process. Bodies
    that do not mention the key pass without being parsed.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

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
        if ALPHA_KEY.encode() in body:
            try:
                self._check(scope["app"].state.vllm_config, bytes(body))
            except UserError as error:
                await _refuse(send, str(error))
                return
        replay = iter(messages)

        async def receive_again() -> dict:
            message = next(replay, None)
            return message if message is not None else await receive()

        await self.app(scope, receive_again, send)

    def _check(self, vllm_config: Any, body: bytes) -> None:
        try:
            # NaN and Infinity are not JSON, but Python's parser (and so vLLM's) takes them.
            request = json.loads(body)
        except ValueError:
            return  # vLLM answers malformed JSON itself
        if not isinstance(request, dict):
            return
        xargs = request.get(_XARGS)
        if ALPHA_KEY in request and not (isinstance(xargs, dict) and ALPHA_KEY in xargs):
            raise UserError(f'{ALPHA_KEY} belongs in {_XARGS}: {{"{ALPHA_KEY}": ...}}')
        if isinstance(xargs, dict):
            ProxyConfig.from_vllm_config(vllm_config).alpha_of(xargs)


async def _refuse(send: Any, message: str) -> None:
    """Answer in the form of OpenAI's API errors, as vLLM does."""
    error = {"message": message, "type": "BadRequestError", "param": ALPHA_KEY, "code": 400}
    body = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 400, "headers": headers})
    await send({"type": "http.response.body", "body": body})
