"""A reverse proxy that makes every call wait as over a long way, and counts calls and bytes."""

import asyncio
from collections.abc import AsyncIterator

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route


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

    async def forward(self, request: Request) -> StreamingResponse:
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

        async def parts() -> AsyncIterator[bytes]:
            try:
                async for part in answer.aiter_raw():
                    self.bytes += len(part)
                    yield part
            finally:
                await answer.aclose()

        return StreamingResponse(
            parts(), answer.status_code, {"content-type": answer.headers["content-type"]}
        )
