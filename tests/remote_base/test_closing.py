"""A stream that is closed early is closed there and then, not when the collector finds it."""

import asyncio
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from fake_base import KEY, VOCAB, FakeBase
from remote_base_bench.latency_proxy import LatencyProxy
from remote_base_bench.serving import serving

from proxy_vllm.remote_base.endpoint import Endpoint
from proxy_vllm.remote_base.settings import RemoteBase
from proxy_vllm.remote_base.usage import Usage


@contextmanager
def left_to_the_collector() -> Iterator[list[str]]:
    """Names of the async generators of this thread's loop that nobody closed."""
    found: list[str] = []
    hooks = sys.get_asyncgen_hooks()

    def finalizer(generator) -> None:
        found.append(generator.__qualname__)
        hooks.finalizer(generator)

    sys.set_asyncgen_hooks(hooks.firstiter, finalizer)
    yield found
    sys.set_asyncgen_hooks(*hooks)


async def read_two_rows(url: str) -> list[str]:
    """Read a little of a long continuation; what of it was left to the collector."""
    settings = RemoteBase(url=f"{url}/v1", model="base")
    endpoint = Endpoint(settings, FakeBase().tokenizer, VOCAB)
    try:
        endpoint.settings = await endpoint.probe()
        with left_to_the_collector() as left:
            for ids in ([40, 41], [42, 43], [44, 45]):
                rows = endpoint.rows(ids, 1000, Usage())
                await anext(rows)
                await anext(rows)
                await rows.aclose()
            return list(left)
    finally:
        await endpoint.close()


@pytest.mark.parametrize("through_proxy", [False, True])
def test_closed_rows_close_the_bases_stream(monkeypatch, through_proxy):
    monkeypatch.setenv("PROXY_VLLM_BASE_API_KEY", KEY)
    base = FakeBase()
    with serving(base.app) as target:
        proxy = LatencyProxy(target)
        with serving(proxy.app) as url:
            left = asyncio.run(read_two_rows(url if through_proxy else target))
            # The client's own generators below ours are the client's.
            assert not [name for name in left if name.startswith("Endpoint.")]

            async def all_closed() -> None:
                while base.closed_early < 3:
                    await asyncio.sleep(0.01)

            asyncio.run(asyncio.wait_for(all_closed(), 10))
