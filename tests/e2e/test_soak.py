"""The soak script's short form; what it counts and judges is tested without an engine too."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest
from soaking.asking import Ask, Client, Tally
from soaking.watching import grown, trend

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--replicas"]], ids=["server", "replicas"])
def test_500_requests(tmp_path, options):
    if options:
        pytest.importorskip("ray.serve", reason="the extra `ray` is not installed")
    out = tmp_path / "soak.json"
    command = [sys.executable, str(SCRIPTS / "soak.py"), "--requests", "500", "--questions", "6"]
    command += ["--sample-seconds", "2", "--json", str(out), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(out.read_text())
    assert result["requests"] == 500 and not result["faults"]
    tally = result["tally"]
    kinds = {"greedy", "stream", "seeded", "logprobs", "grammar", "chat", "tool", "several"}
    assert kinds <= set(tally["answered"]) and tally["refused"]["bad"]
    assert sum(tally["hung_up"].values()) > 50
    if not options:
        assert result["server_at_rest"]["vllm:num_preemptions"] > 0
    else:
        assert len(result["killed"]) == 2


def ask_once(ask: Ask, answer: tuple[int, dict, str | None]) -> Tally:
    """The tally of one request that a server has answered so."""
    tally = Tally()
    client = Client("http://unused", tally)

    async def send(_):
        return answer

    client._send = send  # type: ignore[method-assign]
    asyncio.run(client.ask(ask))
    return tally


def text(of: str) -> dict:
    return {"choices": [{"text": of}]}


def test_answers_are_judged():
    ask = Ask("greedy", "/", {}, text="a cat")
    right = ask_once(ask, (200, text("a cat"), None))
    assert right.answered == {"greedy": 1} and not right.wrong
    assert "'a dog' instead of 'a cat'" in ask_once(ask, (200, text("a dog"), None)).wrong[0]
    assert "status 500" in ask_once(ask, (500, {"error": "x"}, None)).wrong[0]
    assert "2 ends" in ask_once(ask, (200, text("a cat"), "2 ends and 1 reasons")).wrong[0]
    bad = Ask("bad", "/", {}, refused=400)
    assert ask_once(bad, (400, {"error": {"message": "no"}}, None)).refused == {"bad": 1}
    assert "refused with 400" in ask_once(bad, (400, {}, None)).wrong[0]  # without a reason
    assert "refused with 200" in ask_once(bad, (200, text("a cat"), None)).wrong[0]


def test_growth_is_found():
    flat = [(t, 100.0, 20, 8) for t in range(0, 600, 10)]
    leaking = [(t, 100 + t / 10, 20 + t // 30, 8) for t in range(0, 600, 10)]
    trends = {"flat": trend(flat), "leaking": trend(leaking)}
    found = grown(trends, mib=24, others=8)
    assert len(found) == 2 and all(f.startswith("leaking") for f in found)
    assert trends["leaking"]["rss_mib"]["slope_per_minute"] == pytest.approx(6)
    assert not grown({"short": trend(leaking[:12])}, mib=0, others=0)
