"""What the driver of a Ray batch decides by itself: addresses, resources, progress, reasons."""

import http.server
import re
import socket
import threading
import time

import pytest

from proxy_vllm.errors import UserError

ray_job = pytest.importorskip("proxy_vllm.batch.ray_job", reason="the extra `ray` is not installed")


def nodes(*resources):
    return lambda: [{"Alive": True, "Resources": r} for r in resources]


@pytest.mark.parametrize(
    "gpus, replicas, ranks, asked",
    [
        ((8,), 2, 4, {"num_cpus": 1, "num_gpus": 4}),
        ((4, 4, 0), 8, 1, {"num_cpus": 1, "num_gpus": 1}),
        ((8,), 3, 4, "3 replicas of 4 GPUs need 12 GPUs, and Ray has 8"),
        ((4, 4), 1, 8, "8 GPUs need 8 GPUs, and Ray has 8 on 2 nodes, each replica on one"),
        ((3, 3), 3, 2, "3 replicas of 2 GPUs need 6 GPUs, and Ray has 6 on 2 nodes"),
        ((0,), 1, 1, "1 GPUs need 1 GPUs, and Ray has 0"),
    ],
)
def test_gpus_are_counted_node_by_node(monkeypatch, gpus, replicas, ranks, asked):
    from vllm.platforms import current_platform

    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    there = [{"CPU": 64.0, "GPU": float(n)} if n else {"CPU": 64.0} for n in gpus]
    monkeypatch.setattr(ray_job.ray, "nodes", nodes(*there))
    if isinstance(asked, dict):
        assert ray_job.replica_resources(replicas, ranks) == asked
    else:
        with pytest.raises(UserError, match=re.escape(asked)):
            ray_job.replica_resources(replicas, ranks)


class NotRay(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass


def refused(address):
    with pytest.raises(UserError) as error:
        ray_job._check_reachable(address)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_is_not_ray_is_told_at_once(monkeypatch):
    monkeypatch.setattr(ray_job, "_CONNECT_SECONDS", 0.3)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), NotRay) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for scheme in ("", "ray://"):
            message = refused(f"{scheme}127.0.0.1:{server.server_port}")
            assert message.endswith("what listens there is not Ray")
        server.shutdown()
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        assert "timed out" in refused(f"127.0.0.1:{silent.getsockname()[1]}")
    assert refused("127.0.0.1:1").endswith(
        "no connection to Ray at 127.0.0.1:1: Connection refused"
    )
    assert "no connection to Ray at 127.0.0.1:99999" in refused("127.0.0.1:99999")
    assert refused("somewhere").endswith("auto, HOST:PORT or ray://HOST:PORT is needed")


def test_each_replica_has_its_rates_since_it_was_ready(monkeypatch):
    now = 1000.0
    monkeypatch.setattr(time, "time", lambda: now)
    counts = ray_job._Counts()
    report = {"replica": "aa", "since": 900.0, "prompts": 30, "completion_tokens": 4000}
    counts.add(report)
    # Begun anew after a death: what it did before still counts, and so does the time.
    counts.add({**report, "since": 980.0, "prompts": 20, "completion_tokens": 1000})
    counts.add({**report, "replica": "bb", "since": 990.0, "prompts": 1, "completion_tokens": 5})
    assert counts.blocks == 3
    assert counts.note() == " (aa 0.5 prompts/s 50 tokens/s, bb 0.1 prompts/s 0 tokens/s)"
    assert counts.table().splitlines() == [
        "replica aa: 50 prompts (0.50/s), 5000 output tokens (50.0/s)",
        "replica bb: 1 prompts (0.10/s), 5 output tokens (0.5/s)",
    ]


def test_the_reason_is_one_line():
    inner = ConnectionError(
        "no GCS.\n\nTraceback (most recent call last):\n  x\nRpcError: timed out"
    )
    outer = RuntimeError("wrapped\nmany lines")
    outer.__cause__ = inner
    assert ray_job._reason(outer) == "no GCS."
    inner.args = ("Failed. Last error: Traceback (most recent call last):\n  x\nRpcError: late",)
    assert ray_job._reason(outer) == "Failed. Last error: RpcError: late"
    assert ray_job._reason(RuntimeError("\n\n the cause \nmore")) == "the cause"
    assert ray_job._reason(KeyError()) == "KeyError"
