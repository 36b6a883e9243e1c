"""The page `/playground` (`proxy-vllm serve --playground`): static files, and a few settings.

The page itself is open, as `/docs` and `/metrics` are: it tells the default of alpha, its range,
and whether tokens can be explained and the expert be asked alone. What it sends goes to routes
below `/v1`, which ask for the key.
"""

from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from vllm.logger import init_logger

from proxy_vllm.config import ProxyConfig
from proxy_vllm.errors import UserError
from proxy_vllm.explain.request import check_engine

logger = init_logger(f"vllm.{__name__}")

_PATH = "/playground"
_FILES = Path(__file__).with_name("playground")
_OUTER = "proxy_vllm.app"
_HEADERS = {
    # Scripts, styles and requests of this server alone, and no page of others around it.
    "Content-Security-Policy": "default-src 'self'; img-src data:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


class PlaygroundMiddleware:
    """ASGI middleware that answers `/playground` itself, and passes on everything else."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self._pages = Starlette(
            routes=[
                # Relative, so that it holds behind a proxy that changes the scheme or the path.
                Route(_PATH, lambda _: Response(None, 307, {"Location": "playground/"})),
                Route(f"{_PATH}/settings.json", _settings),
                Mount(_PATH, StaticFiles(directory=_FILES, html=True)),
            ]
        )
        logger.info("A page to try prompts on is at %s", _PATH)

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        if scope["type"] != "http" or not (path == _PATH or path.startswith(f"{_PATH}/")):
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                added = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *added]}
            await send(message)

        await self._pages({**scope, _OUTER: scope["app"]}, receive, send_with_headers)


def _settings(request: Request) -> JSONResponse:
    vllm_config = request.scope[_OUTER].state.vllm_config
    proxy = ProxyConfig.from_vllm_config(vllm_config)
    try:
        check_engine(vllm_config)
        explains = True
    except UserError:
        explains = False
    return JSONResponse(
        {
            "alpha": proxy.alpha,
            "alpha_range": proxy.alpha_range,
            "explain": explains,
            # Whether there is an expert to ask alone: not where that is the base, or none is here.
            "expert": proxy.remote_base is None and proxy.same_weights.get("expert") != "base",
        }
    )
