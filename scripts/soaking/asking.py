"""Requests of every kind with their answers, and one client that asks, hangs up, and judges."""

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp

MODEL = "soak"
CHOICES = ["a cat", "a dog", "a red fox"]
TOOL = {
    "type": "function",
    "function": {
        "name": "keep",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"animal": {"enum": ["cat", "dog", "fox"]}},
            "required": ["animal"],
            "additionalProperties": False,
        },
    },
}


@dataclass
class Ask:
    """One kind of request, and what its answer must be.

    ``check`` takes the whole answer and returns what is wrong with it, or None.
    """

    kind: str
    path: str
    body: Any
    check: Callable[[Any], str | None] | None = None
    refused: int | None = None  # the status that it must be refused with
    stream: bool = False
    text: str | None = None  # the answer known before


@dataclass
class Tally:
    """What happened to all requests."""

    asked: Counter[str] = field(default_factory=Counter)
    answered: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    hung_up: Counter[str] = field(default_factory=Counter)
    retried: int = 0
    wrong: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        counters = {n: dict(getattr(self, n)) for n in ("asked", "answered", "refused", "hung_up")}
        lists = {n: [t[:400] for t in getattr(self, n)[:20]] for n in ("wrong", "lost")}
        counts = {f"{n}_count": len(getattr(self, n)) for n in ("wrong", "lost")}
        return {**counters, "retried": self.retried, **counts, **lists}


def make_asks(questions: list[str], seed: int) -> list[Ask]:
    """A pool that holds every kind; answers that have to be known are asked for once, alone."""
    rng = random.Random(seed)
    asks: list[Ask] = []

    def body(alpha: float | None, **fields: Any) -> dict[str, Any]:
        more = {} if alpha is None else {"vllm_xargs": {"proxy_alpha": alpha}}
        return {"model": MODEL, "max_tokens": 8 + rng.randrange(24), **more, **fields}

    for i, question in enumerate(questions):
        alpha = [None, 0.0, 0.5, 1.5, -1.0][i % 5]
        plain = {"prompt": question, "temperature": 0}
        asks.append(Ask("greedy", "/v1/completions", body(alpha, **plain)))
        asks.append(
            Ask("stream", "/v1/completions", body(alpha, **plain, stream=True), stream=True)
        )
        drawn = {"prompt": question, "temperature": 0.9, "seed": 1 + i, "top_p": 0.9, "top_k": 30}
        if i % 2:
            drawn = {"prompt": question, "temperature": 1.1, "seed": 1 + i, "min_p": 0.05}
        asks.append(Ask("seeded", "/v1/completions", body(alpha, **drawn, ignore_eos=True)))
        asks.append(
            Ask(
                "logprobs",
                "/v1/completions",
                body(alpha, **plain, logprobs=3, ignore_eos=True),
                check=lambda a: None if a["choices"][0]["logprobs"]["tokens"] else "no logprobs",
            )
        )
        asks.append(
            Ask(
                "grammar",
                "/v1/completions",
                body(alpha, **plain, structured_outputs={"choice": CHOICES}) | {"max_tokens": 24},
                check=lambda a: None if a["choices"][0]["text"] in CHOICES else "not a choice",
            )
        )
        chat = {"messages": [{"role": "user", "content": question}], "temperature": 0}
        asks.append(Ask("chat", "/v1/chat/completions", body(alpha, **chat)))
        named = {"type": "function", "function": {"name": "keep"}}
        asks.append(
            Ask(
                "tool",
                "/v1/chat/completions",
                body(alpha, **chat, tools=[TOOL], tool_choice=named) | {"max_tokens": 64},
                check=_tool_is_wrong,
            )
        )
        asks.append(
            Ask(
                "several",
                "/v1/completions",
                body(alpha, prompt=question, temperature=1.0, n=2),
                check=lambda a: None if len(a["choices"]) == 2 else "not two choices",
            )
        )
    for fields, status in (
        ({"vllm_xargs": {"proxy_alpha": 99}}, 400),
        ({"vllm_xargs": {"proxy_alpha": "much"}}, 400),
        ({"max_tokens": -1}, 400),
        ({"temperature": -2}, 400),
        ({"model": "another"}, 404),
    ):
        bad = {"model": MODEL, "prompt": "Q", **fields}
        asks.append(Ask("bad", "/v1/completions", bad, refused=status))
    asks.append(Ask("bad", "/v1/completions", "{no json", refused=400))
    return asks


def _tool_is_wrong(answer: dict[str, Any]) -> str | None:
    if answer["choices"][0]["finish_reason"] == "length":
        return None  # cut before its end
    call = answer["choices"][0]["message"]["tool_calls"][0]["function"]
    animal = json.loads(call["arguments"]).get("animal")
    return None if animal in ("cat", "dog", "fox") else f"animal is {animal}"


class Client:
    """Asks one server; every request ends in the tally once."""

    def __init__(self, url: str, tally: Tally, retries: int = 0) -> None:
        self.url, self.tally, self.retries = url, tally, retries
        self.session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> "Client":
        timeout = aiohttp.ClientTimeout(total=300)
        connector = aiohttp.TCPConnector(limit=0)
        self.session = aiohttp.ClientSession(timeout=timeout, connector=connector)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self.session is not None
        await self.session.close()

    async def know(self, asks: list[Ask]) -> None:
        """Ask alone, one after another, for the answers that must come again."""
        for ask in asks:
            if ask.kind in ("greedy", "stream", "seeded", "chat", "logprobs"):
                status, answer, fault = await self._send(ask)
                if status != 200 or fault:
                    raise RuntimeError(f"{ask.kind} {ask.body}: {status} {fault} {answer}")
                ask.text = text_of(answer)

    async def ask(self, ask: Ask, hang_up_after: float | None = None) -> None:
        """Send one request, or begin it and leave after some seconds."""
        tally = self.tally
        tally.asked[ask.kind] += 1
        for attempt in range(self.retries + 1):
            try:
                if hang_up_after is None:
                    status, answer, fault = await self._send(ask)
                else:
                    async with asyncio.timeout(hang_up_after):
                        status, answer, fault = await self._send(ask)
                if status >= 500 and attempt < self.retries:
                    raise aiohttp.ClientError(f"{status} {answer}")
                break
            except TimeoutError:
                if hang_up_after is not None:
                    tally.hung_up[ask.kind] += 1
                else:
                    tally.lost.append(f"{ask.kind}: no answer in time")
                return
            except aiohttp.ClientError as error:
                if attempt == self.retries:
                    tally.lost.append(f"{ask.kind}: {type(error).__name__} {error}")
                    return
                tally.retried += 1
                await asyncio.sleep(min(2.0, 0.5 * (attempt + 1)))
        if fault is None and ask.refused is not None:
            reason = isinstance(answer, dict) and (answer.get("error") or answer.get("message"))
            if status != ask.refused or not reason:
                fault = f"refused with {status} and {answer}, not with {ask.refused} and a reason"
            else:
                tally.refused[ask.kind] += 1
        elif fault is None and status != 200:
            fault = f"status {status}: {answer}"
        elif fault is None:
            if ask.text is not None and text_of(answer) != ask.text:
                fault = f"{text_of(answer)!r} instead of {ask.text!r}"
            elif ask.check is not None:
                try:
                    fault = ask.check(answer)
                except (KeyError, IndexError, TypeError, ValueError) as error:
                    fault = f"{error!r} in {json.dumps(answer)[:600]}"
            tally.answered[ask.kind] += 1
        if fault is not None:
            tally.wrong.append(f"{ask.kind} {json.dumps(ask.body)[:200]}: {fault}")

    async def _send(self, ask: Ask) -> tuple[int, Any, str | None]:
        """Status, answer (of a stream: its parts put together), and what is wrong with its form."""
        assert self.session is not None
        data = ask.body if isinstance(ask.body, str) else json.dumps(ask.body)
        headers = {"Content-Type": "application/json"}
        async with self.session.post(self.url + ask.path, data=data, headers=headers) as response:
            if not ask.stream or response.status != 200:
                text = await response.text()
                try:
                    return response.status, json.loads(text), None
                except json.JSONDecodeError:
                    return response.status, text, None
            text, ends, reasons = "", 0, 0
            async for line in response.content:
                if not line.startswith(b"data: "):
                    continue
                if line.strip() == b"data: [DONE]":
                    ends += 1
                    continue
                part = json.loads(line[6:])
                if "choices" not in part:
                    return 500, part, None
                for choice in part["choices"]:
                    text += choice["text"]
                    reasons += choice["finish_reason"] is not None
            if ends == 0:
                raise aiohttp.ClientPayloadError("the stream broke off")
            fault = None if ends == reasons == 1 else f"{ends} ends and {reasons} reasons"
            return 200, {"choices": [{"text": text}]}, fault


def text_of(answer: dict[str, Any]) -> str:
    choice = answer["choices"][0]
    return choice["text"] if "text" in choice else choice["message"]["content"] or ""
