"""What `/metrics` tells of steering, beside vLLM's own: requests by alpha, changed tokens, memory.

Requests are counted where they are answered. The rest is known to the workers and asked for when
`/metrics` is read, by one call between two steps: a server that nobody watches spends nothing.
With several API servers (`--api-server-count`) prometheus_client adds up counters over their
processes, and of a gauge it tells what was set last, by whichever of them was asked.
"""

import asyncio
import time
from collections.abc import Iterable
from typing import Any

from prometheus_client import Counter, Gauge
from vllm.logger import init_logger

from proxy_vllm.config import ProxyConfig

logger = init_logger(f"vllm.{__name__}")

# Where admission leaves the alpha that a request names, or the member that it asks alone.
SCOPE_KEY = "proxy_vllm.alpha"

# Upper ends of the ranges by which requests are counted. Exactly 0, the base alone, is its own.
_ALPHA_ENDS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)

_ANSWERS = (
    *("/v1/completions", "/v1/chat/completions", "/v1/chat/completions/batch", "/v1/responses"),
    *("/v1/messages", "/cohere/v2/chat", "/inference/v1/generate", "/invocations"),
    "/generative_scoring",
)
# Seconds for an answer: longer than any step, shorter than Prometheus waits for a page.
_PATIENCE = 5.0
# Seconds between two questions. `/metrics` needs no key, and must not slow the engine down.
_SPACING = 1.0

_REQUESTS = Counter(
    "proxy_vllm:requests", "Answered HTTP requests by the range of their alpha", ["alpha"]
)


def _gauge(name: str, text: str, *labels: str) -> Gauge:
    return Gauge(f"proxy_vllm:{name}", text, ["engine", *labels], multiprocess_mode="mostrecent")


_MEMORY = _gauge(
    "member_memory_bytes", "Weights and KV cache of each member", "rank", "member", "kind"
)
_COMPARED = _gauge(
    "compared_tokens", "Steered tokens that were compared with the base's (--changed-tokens-every)"
)
_CHANGED = _gauge("changed_tokens", "Of the compared tokens, those that the base would not choose")
_DRAFTS = _gauge("num_drafts", "Tokens that the expert drafts in a step (--speculative-tokens)")


def alpha_range(alpha: float | str) -> str:
    """The range by which a request is counted: ``<0``, ``0``, ``0-0.25``, ..., ``>3``.

    One that asks for a small member alone has no alpha and is counted by the member's name.
    """
    if isinstance(alpha, str):
        return "0" if alpha == "base" else alpha
    if alpha < 0:
        return "<0"
    low = 0.0
    if alpha == low:
        return "0"
    for end in _ALPHA_ENDS:
        if alpha <= end:
            return f"{low:g}-{end:g}"
        low = end
    return f">{low:g}"


class MetricsMiddleware:
    """ASGI middleware that counts requests, and asks the workers when `/metrics` is read.

    It stands behind admission, which knows the alpha of a request.
    """

    def __init__(self, app: Any) -> None:
        self.app = app
        self._proxy: ProxyConfig | None = None
        self._asking: asyncio.Task | None = None
        self._asked = 0.0

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        path, method = scope.get("path", ""), scope.get("method")
        if scope["type"] == "http" and method == "GET" and path.rstrip("/").endswith("/metrics"):
            await self._refresh(scope["app"].state)
        elif scope["type"] == "http" and method == "POST" and path.endswith(_ANSWERS):
            send = self._counting(scope, send)
        await self.app(scope, receive, send)

    def _counting(self, scope: dict, send: Any) -> Any:
        async def send_and_count(message: dict) -> None:
            if message["type"] == "http.response.start" and message["status"] == 200:
                alpha = scope.get(SCOPE_KEY)
                if alpha is None:
                    alpha = self._config(scope["app"].state).alpha
                _REQUESTS.labels(alpha_range(alpha)).inc()
            await send(message)

        return send_and_count

    def _config(self, state: Any) -> ProxyConfig:
        if self._proxy is None:
            self._proxy = ProxyConfig.from_vllm_config(state.vllm_config)
        return self._proxy

    async def _refresh(self, state: Any) -> None:
        """Set the gauges. A page without news is better than none, so nothing is raised."""
        engine = getattr(state, "engine_client", None)
        if engine is None:
            return
        now = time.monotonic()
        if self._asking is None or (self._asking.done() and now - self._asked >= _SPACING):
            self._asking, self._asked = asyncio.ensure_future(_ask(engine.engine_core)), now
        try:
            # An engine that is busy for longer is asked once, however often the page is read.
            by_engine = await asyncio.wait_for(asyncio.shield(self._asking), _PATIENCE)
        except Exception as error:
            logger.debug("The workers did not tell /metrics their part: %r", error)
            return
        for index, workers in by_engine:
            _show(str(index), workers, self._config(state))


async def _ask(core: Any) -> Iterable[tuple[int, list[dict]]]:
    """What the workers of each engine tell."""
    asked = ("proxy_stats", None, (), None)
    told = await core.call_utility_all_async("collective_rpc", *asked)
    return list(zip(core.engine_ranks_managed, told))


def _show(engine: str, workers: list[dict], proxy: ProxyConfig) -> None:
    for worker in workers:
        for kind in ("weights", "kv_cache"):
            for member, count in worker[kind].items():
                _MEMORY.labels(engine, str(worker["rank"]), member, kind).set(count)
    # Tensor-parallel ranks count the same, and only those of the last pipeline stage count at all.
    if proxy.changed_tokens_every:
        _COMPARED.labels(engine).set(max(worker["compared"] for worker in workers))
        _CHANGED.labels(engine).set(max(worker["changed"] for worker in workers))
    if proxy.expert_drafts:
        _DRAFTS.labels(engine).set(max(worker["num_drafts"] for worker in workers))
