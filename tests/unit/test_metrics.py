"""The middleware of `/metrics`, with an application behind it and an engine core that answers."""

import asyncio
from types import SimpleNamespace

import pytest
from prometheus_client import REGISTRY

from proxy_vllm.config import CONFIG_KEY, ProxyConfig
from proxy_vllm.server import metrics
from proxy_vllm.server.admission import AdmissionMiddleware
from proxy_vllm.server.metrics import MetricsMiddleware, alpha_range


class Core:
    """Two engines, the second with two ranks of which one counts."""

    engine_ranks_managed = (0, 1)

    def __init__(self) -> None:
        self.asked = 0
        self.answer = asyncio.Event()
        self.answer.set()
        self.fails = False

    async def call_utility_all_async(self, *asked):
        assert asked == ("collective_rpc", "proxy_stats", None, (), None)
        self.asked += 1
        await self.answer.wait()
        if self.fails:
            raise RuntimeError("the engine is dead")
        members = {"base": 100, "expert": 10, "antiexpert": 10}
        worker = {"weights": members, "kv_cache": members, "num_drafts": 3}
        return [
            [{**worker, "rank": 0, "compared": 7, "changed": 2}],
            [
                {**worker, "rank": 0, "compared": 0, "changed": 0},
                {**worker, "rank": 1, "compared": 9 * self.asked, "changed": 4},
            ],
        ]


class Server:
    def __init__(self, **settings) -> None:
        proxy = ProxyConfig("e", "a", alpha=1.5, **settings)
        config = SimpleNamespace(additional_config={CONFIG_KEY: proxy.to_dict()})
        self.core = Core()
        engine = SimpleNamespace(
            engine_core=self.core, vllm_config=config, input_processor=SimpleNamespace()
        )
        self.state = SimpleNamespace(vllm_config=config, engine_client=engine)
        self.status = 200
        # In the order in which a server adds them.
        self.app = AdmissionMiddleware(MetricsMiddleware(self._answer))

    async def _answer(self, scope, receive, send):
        if scope["method"] == "POST":
            await receive()
        await send({"type": "http.response.start", "status": self.status, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    async def ask(self, path: str, body: bytes = b"", method: str = "POST") -> int:
        sent = []

        async def receive():
            return {"type": "http.request", "body": body}

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "method": method, "path": path, "headers": []}
        await self.app({**scope, "app": SimpleNamespace(state=self.state)}, receive, send)
        return sent[0]["status"]

    async def read_metrics(self) -> int:
        return await self.ask("/metrics", method="GET")


def value(name: str, **labels) -> float | None:
    return REGISTRY.get_sample_value(f"proxy_vllm:{name}", labels)


@pytest.mark.parametrize(
    ("alpha", "label"),
    [
        *[(-2, "<0"), (-1e-9, "<0"), (0, "0"), (-0.0, "0"), (1e-9, "0-0.25"), (0.25, "0-0.25")],
        *[(0.3, "0.25-0.5"), (1, "0.75-1"), (1.01, "1-1.5"), (3, "2-3"), (3.5, ">3")],
        *[("base", "0"), ("expert", "expert")],
    ],
)
def test_ranges(alpha, label):
    assert alpha_range(alpha) == label


def test_answered_requests_are_counted_by_their_alpha():
    server = Server()

    def counted(path: str, body: bytes) -> dict[str, float]:
        ranges = ("<0", "0", "0.25-0.5", "1-1.5")
        before = {r: value("requests_total", alpha=r) or 0.0 for r in ranges}
        asyncio.run(server.ask(path, body))
        after = {r: value("requests_total", alpha=r) or 0.0 for r in ranges}
        return {r: after[r] - before[r] for r in ranges if after[r] != before[r]}

    completions, named = "/v1/completions", b'{"vllm_xargs": {"proxy_alpha": %s}}'
    assert counted(completions, b'{"prompt": "hello"}') == {"1-1.5": 1}
    assert counted(completions, named % b"0") == {"0": 1}
    assert counted("/v1/chat/completions", named % b"0.5") == {"0.25-0.5": 1}
    assert counted("/v1/responses", named % b"-1") == {"<0": 1}
    tokens = b'{"sampling_params": {"extra_args": {"proxy_alpha": 0.5}}}'
    assert counted("/inference/v1/generate", tokens) == {"0.25-0.5": 1}
    # Neither what admission refuses, nor what vLLM does, nor what answers nothing.
    assert counted(completions, named % b"99") == {}
    assert counted("/v1/chat/completions/render", named % b"0.5") == {}
    assert counted("/tokenize", b"{}") == {}
    server.status = 404
    assert counted(completions, named % b"0") == {}


def test_gauges_are_what_the_workers_tell(monkeypatch):
    monkeypatch.setattr(metrics, "_SPACING", 0.0)
    server = Server(changed_tokens_every=8, speculative_tokens=4)
    assert asyncio.run(server.read_metrics()) == 200
    memory = {"rank": "1", "member": "base", "kind": "kv_cache"}
    assert value("member_memory_bytes", engine="1", **memory) == 100
    assert value("compared_tokens", engine="0") == 7
    assert value("changed_tokens", engine="0") == 2
    # Of the rank that counts.
    assert value("compared_tokens", engine="1") == 9
    assert value("num_drafts", engine="1") == 3
    asyncio.run(server.read_metrics())
    assert value("compared_tokens", engine="1") == 18


def test_what_is_off_is_not_shown():
    for gauge in (metrics._COMPARED, metrics._CHANGED, metrics._DRAFTS):
        gauge.clear()
    asyncio.run(Server().read_metrics())
    assert value("compared_tokens", engine="0") is None
    assert value("num_drafts", engine="0") is None


def test_the_page_comes_without_the_engine(monkeypatch):
    """Busy for long, dead, or not there (vLLM's render server): the rest is told all the same."""
    monkeypatch.setattr(metrics, "_PATIENCE", 0.05)
    monkeypatch.setattr(metrics, "_SPACING", 0.0)

    async def read() -> None:
        server = Server()
        server.core.answer.clear()
        for _ in range(3):
            assert await server.read_metrics() == 200
        assert server.core.asked == 1
        server.core.answer.set()
        await asyncio.sleep(0)
        server.core.fails = True
        assert await server.read_metrics() == 200
        del server.state.engine_client
        assert await server.read_metrics() == 200

    asyncio.run(read())


def test_many_readers_cost_one_question():
    server = Server()

    async def read() -> None:
        await asyncio.gather(*(server.read_metrics() for _ in range(20)))
        await server.read_metrics()

    asyncio.run(read())
    assert server.core.asked == 1
