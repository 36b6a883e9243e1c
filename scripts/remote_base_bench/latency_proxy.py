"""A reverse proxy that makes every call wait as over a long way, and counts calls and bytes."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import anyio
import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route


class Forwarded(StreamingResponse):
    """An answer on its way, closed when its client leaves.

    Starlette stops reading then and closes nothing: a generator that the collector finds is closed
    in another task, at any time.
    """

    def __init__(self, answer: httpx.Response, parts: AsyncGenerator[bytes, None]) -> None:
        super().__init__(
            parts, answer.status_code, {"content-type": answer.headers["content-type"]}
        )
        self._answer, self._parts = answer, parts

    async def __call__(self, *of_asgi: Any) -> None:
        try:
            await super().__call__(*of_asgi)
        finally:
            with anyio.CancelScope(shield=True):
                await self._parts.aclose()
                await self._answer.aclose()


class LatencyProxy:
    """Forwards to ``target``.

    Attributes:
        seconds: a call waits so long before it is forwarded, as a round trip does.
        calls, bytes: so many so far, of answers' bodies.
    """

    def __init__(self, target: str) -> None:
        self.target, self.seconds, self.calls, self.bytes = target, 0.0, 0, 0
        self._client: httpx.AsyncClient | None = None
        self.app = Starlette(routes=[Route("/{path:path}", self.forward, methods=["GET", "POST"])])

    async def forward(self, request: Request) -> Forwarded:
        if self._client is None:
            limits = httpx.Limits(max_connections=None)
            self._client = httpx.AsyncClient(timeout=600, limits=limits)
        self.calls += 1
        body = await request.body()
        await asyncio.sleep(self.seconds)
        names = ("content-type", "authorization")
        answer = await self._client.send(
            self._client.build_request(
                request.method,
                f"{self.target}/{request.path_params['path']}",
                content=body,
                headers={n: v for n, v in request.headers.items() if n in names},
            ),
            stream=True,
        )

        async def parts() -> AsyncGenerator[bytes, None]:
            raw: Any = answer.aiter_raw()
            async with aclosing(raw):
                async for part in raw:
                    self.bytes += len(part)
                    yield part

        return Forwarded(answer, parts())
