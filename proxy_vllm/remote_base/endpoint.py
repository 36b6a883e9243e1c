"""The base's endpoint: rows of log-probabilities over HTTP, through OpenAI's client.

The client retries what may be tried again (429, 408, 409, 5xx, lost connections), heeds
``Retry-After`` and keeps time-outs; here are the dialects, limits and the check at the start.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import numpy as np
import openai

from proxy_vllm.envs import base_api_key
from proxy_vllm.errors import UserError, one_line
from proxy_vllm.remote_base.bounds import BaseRow
from proxy_vllm.remote_base.dialects import (
    DIALECTS,
    Dialect,
    get_dialect,
    read_choice,
    request_body,
)
from proxy_vllm.remote_base.settings import RemoteBase
from proxy_vllm.remote_base.token_names import TokenNames
from proxy_vllm.remote_base.usage import BaseUnavailable, Guard, Price, Usage

_PROBE = "The capital of France is"


class Endpoint:
    """A base of which only top log-probabilities are known.

    Args:
        settings: where it is and how it may be used.
        tokenizer: of Transformers, the base's own; its ids are the pair's.
        vocab_size: of the pair.
    """

    def __init__(self, settings: RemoteBase, tokenizer: Any, vocab_size: int) -> None:
        self.settings, self.tokenizer, self.vocab_size = settings, tokenizer, vocab_size
        price = None if settings.price is None else Price.parse(settings.price)
        self.guard = Guard(settings.max_calls, settings.max_cost, price)
        # None until `probe` has found it out.
        self.dialect = None if settings.dialect == "auto" else get_dialect(settings.dialect)
        self.names = TokenNames(tokenizer, vocab_size)
        self.top = vocab_size if settings.top_logprobs == -1 else settings.top_logprobs
        self._key = base_api_key()
        self._client = openai.AsyncOpenAI(
            base_url=settings.url,
            api_key=self._key or "none",
            timeout=settings.timeout,
            max_retries=settings.retries,
        )
        # Held by a trip and not by a call: a stream is still open while its row is asked about, and
        # streams that wait for each other's slots would wait for ever.
        self.trips = asyncio.Semaphore(settings.concurrency)

    @property
    def continues(self) -> bool:
        """Whether it can go on after tokens that were not its own choice."""
        assert self.dialect is not None
        return self.dialect.route == "completions"

    @property
    def can_ask_ids(self) -> bool:
        return self._dialect().ask_ids is not None

    @property
    def max_biases(self) -> int:
        return self._dialect().max_biases

    async def row(self, ids: Sequence[int], usage: Usage) -> BaseRow:
        """The base's row after ``ids``.

        Raises:
            BaseUnavailable: no answer, an error, or an answer that cannot be read.
        """
        rows = [row async for row in self.rows(ids, 1, usage)]
        if not rows:
            raise self._error("it answered without a row of log-probabilities")
        return rows[0]

    async def rows_after(self, prefixes: list[list[int]], usage: Usage) -> list[BaseRow]:
        """The base's rows after several beginnings, at the same time.

        Raises:
            BaseUnavailable: as for ``row``.
        """
        if not self._dialect().lists:
            return list(await asyncio.gather(*(self.row(ids, usage) for ids in prefixes)))
        prompts = [self._prompt(ids) for ids in prefixes]
        body = request_body(self._dialect(), self.settings.model, prompts, 1, self._top())
        data = await self._post(body, usage)
        if isinstance(data, dict) and isinstance(data.get("choices"), list):
            data["choices"].sort(key=lambda choice: choice["index"])
        rows = self._read(data)
        if len(rows) != len(prefixes):
            raise self._error(f"it answered {len(rows)} of {len(prefixes)} prompts")
        return rows

    async def compared_row(
        self, ids: Sequence[int], bias: dict[int, float], usage: Usage
    ) -> BaseRow:
        """The base's row after ``ids``, and which of some tokens wins with its bias: in one call.

        Only where ``settings.compares``.
        """
        named = {str(token): value for token, value in bias.items()}
        body = request_body(
            self._dialect(),
            self.settings.model,
            self._prompt(ids),
            1,
            self._top(),
            logit_bias=named,
        )
        rows = self._read(await self._post(body, usage))
        if len(rows) != 1:
            raise self._error("it answered without a row of log-probabilities")
        return rows[0].after_comparison(np.array(list(bias), dtype=np.int64))

    async def rows(
        self, ids: Sequence[int], max_tokens: int, usage: Usage
    ) -> AsyncGenerator[BaseRow, None]:
        """The base's own greedy continuation, position by position, until it is closed.

        Closing the iterator closes the stream, which ends the endpoint's work. An answer that ends
        early, by an end that is not reported as a row, ends the iterator.
        """
        dialect = self._dialect()
        body = request_body(
            dialect, self.settings.model, self._prompt(ids), max_tokens, self._top()
        )
        received = 0
        try:
            if max_tokens == 1:
                data = await self._post(body, usage)
                for row in self._read(data):
                    yield row
                return
            async with aclosing(self._stream(body, usage)) as stream:
                async for data in stream:
                    for row in self._read(data):
                        received += 1
                        yield row
        finally:
            if max_tokens > 1:
                usage.prompt_tokens += len(ids)
                usage.completion_tokens += received
                self.guard.usage.prompt_tokens += len(ids)
                self.guard.usage.completion_tokens += received

    async def ask(self, ids: Sequence[int], tokens: np.ndarray, usage: Usage) -> np.ndarray:
        """Log-probabilities of ``tokens`` after ``ids``, where the dialect can ask for them."""
        dialect = self._dialect()
        assert dialect.ask_ids is not None
        more = {dialect.ask_ids: tokens.tolist()}
        body = request_body(dialect, self.settings.model, self._prompt(ids), 1, 1, **more)
        usage.questions += 1
        (reported,) = self._reported(await self._post(body, usage))
        found = dict(reported.top)
        if missing := [t for t in tokens.tolist() if t not in found]:
            raise self._error(f"{dialect.ask_ids} was not answered for token {missing[0]}")
        return np.array([found[t] for t in tokens.tolist()], dtype=np.float64)

    async def argmax(self, ids: Sequence[int], bias: dict[int, float], usage: Usage) -> int:
        """The token that the endpoint chooses with these biases added to its logits."""
        named = {str(token): value for token, value in bias.items()}
        body = request_body(
            self._dialect(), self.settings.model, self._prompt(ids), 1, 1, logit_bias=named
        )
        usage.questions += 1
        (reported,) = self._reported(await self._post(body, usage))
        return self.names.id_of(reported.token)

    async def close(self) -> None:
        await self._client.close()

    async def probe(self) -> RemoteBase:
        """Find the dialect, and check that the endpoint's tokens are those of our tokenizer.

        Returns:
            The settings with the dialect, and as many log-probabilities as the endpoint gives.

        Raises:
            UserError: an endpoint that cannot serve as the base, with the reason.
        """
        if self.dialect is None:
            self.dialect = get_dialect(await self._guess())
        ids = self.tokenizer(_PROBE, add_special_tokens=False).input_ids
        try:
            row = await self._probe_row(ids)
        except BaseUnavailable as error:
            raise UserError(f"--base-url {self.settings.url}: {error}") from None
        if not len(row.ids):
            raise UserError(
                f"--base-url {self.settings.url}: it reports no log-probability of a token that"
                " our tokenizer has: --base-tokenizer names the base's own"
            )
        if self.dialect.naming == "token_id":
            await self._compare_texts(ids, row)
        top = -1 if self.top == self.vocab_size else self.top
        compares = (
            self.settings.drafts > 0
            and len(row.ids) < self.vocab_size
            and await self._compares(ids, row)
        )
        return replace(
            self.settings, dialect=self.dialect.name, top_logprobs=top, compares=compares
        )

    async def _probe_row(self, ids: list[int]) -> BaseRow:
        usage = Usage()
        try:
            return await self.row(ids, usage)
        except BaseUnavailable:
            if self.top <= 5:
                raise
        # Endpoints differ in how many they report at most; five is what all of them do.
        self.top = 5
        return await self.row(ids, usage)

    async def _compares(self, ids: list[int], row: BaseRow) -> bool:
        """Whether biases choose the token and leave the reported row as it is."""
        if self._dialect().naming not in ("token_id", "id"):
            return False  # text may not say which token won
        raised = next(token for token in range(self.vocab_size) if token not in row.ids)
        try:
            biased = await self.compared_row(ids, {raised: 100.0}, Usage())
        except BaseUnavailable:
            return False  # no biases there
        known = dict(zip(biased.ids.tolist(), biased.logprobs.tolist()))
        return biased.token == raised and all(
            abs(known.get(token, 1.0) - logprob) < 1e-3
            for token, logprob in zip(row.ids.tolist(), row.logprobs.tolist())
        )

    async def _compare_texts(self, ids: list[int], row: BaseRow) -> None:
        """Ids are only numbers: their text must be what our tokenizer makes of them."""
        dialect = self._dialect()
        body = request_body(dialect, self.settings.model, ids, 1, self._top())
        del body["return_tokens_as_token_ids"]
        data = await self._post(body, Usage())
        (choice,) = data["choices"]
        ours = self.tokenizer.decode([row.token])
        theirs = choice["logprobs"]["tokens"][0]
        if ours != theirs and "\ufffd" not in ours + theirs:
            raise UserError(
                f"--base-url {self.settings.url}: token {row.token} is {theirs!r} there and"
                f" {ours!r} in our tokenizer: --base-tokenizer names the base's own"
            )

    async def _guess(self) -> str:
        """The dialect, from how the endpoint presents itself."""
        host = self._client.base_url.host
        for part, name in (("openai.com", "openai"), ("together", "together")):
            if part in host:
                return name
        try:
            models = await self._client.get("/models", cast_to=object)
        except openai.OpenAIError as error:
            raise UserError(f"--base-url {self.settings.url}: {self._reason(error)}") from None
        owners = {str(m.get("owned_by")) for m in models.get("data", [])}  # type: ignore[attr-defined]
        known = {"vllm": "vllm", "llamacpp": "llama.cpp", "me": "llama-cpp-python"}
        for owner, name in known.items():
            if owner in owners:
                return name
        raise UserError(
            f"--base-url {self.settings.url}: its kind is not known; name it by --base-dialect"
            f" ({', '.join(DIALECTS)})"
        )

    def _dialect(self) -> Dialect:
        assert self.dialect is not None, "probe() comes first"
        return self.dialect

    def _top(self) -> int:
        limit = self._dialect().max_top
        return self.top if limit is None else min(self.top, limit)

    def _prompt(self, ids: Sequence[int]) -> Any:
        return list(ids) if self._dialect().prompt == "ids" else self.text(ids)

    def text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)

    def reads_alike(self, ids: Sequence[int]) -> bool:
        """Whether the endpoint reads the tokens ``ids``: text may be split into others."""
        if self._dialect().prompt == "ids":
            return True
        return self.tokenizer(self.text(ids), add_special_tokens=False).input_ids == list(ids)

    async def _post(self, body: dict[str, Any], usage: Usage) -> Any:
        async with self._call(usage):
            data: Any = await self._client.post(self._path(), body=body, cast_to=object)
        told = data.get("usage") or {} if isinstance(data, dict) else {}
        cached = (told.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        for counts in (usage, self.guard.usage):
            counts.prompt_tokens += told.get("prompt_tokens") or 0
            counts.completion_tokens += told.get("completion_tokens") or 0
            counts.cached_tokens += cached
        return data

    async def _stream(self, body: dict[str, Any], usage: Usage) -> AsyncGenerator[Any, None]:
        async with self._call(usage):
            stream = await self._client.post(
                self._path(),
                body={**body, "stream": True},
                cast_to=object,
                stream=True,
                stream_cls=openai.AsyncStream[object],
            )
            try:
                async for data in stream:
                    yield data
            finally:
                await stream.close()

    def _path(self) -> str:
        return "/chat/completions" if self._dialect().route == "chat" else "/completions"

    def _call(self, usage: Usage) -> "_Call":
        return _Call(self, usage)

    def _reported(self, data: Any) -> list[Any]:
        try:
            return [r for choice in data["choices"] for r in read_choice(self._dialect(), choice)]
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise self._error(
                f"its answer is not in the form of {self._dialect().name} ({one_line(error)})"
            ) from None

    def _read(self, data: Any) -> list[BaseRow]:
        try:
            return [self.names.row(r, self.vocab_size) for r in self._reported(data)]
        except ValueError as error:
            raise self._error(str(error)) from None

    def _error(self, reason: str) -> BaseUnavailable:
        return BaseUnavailable(f"the base's endpoint: {reason}")

    def _reason(self, error: Exception) -> str:
        """What went wrong, without the key."""
        if isinstance(error, openai.APIStatusError):
            text = f"it answered {error.status_code}: {one_line(error)[:300]}"
        elif isinstance(error, openai.APITimeoutError):
            text = f"no answer within {self.settings.timeout:g} s (--base-timeout)"
        else:
            text = f"{one_line(error.__cause__ or error)}"
        return text.replace(self._key, "***") if self._key else text


class _Call:
    """One call: within the limits, counted, and its failure in one line."""

    def __init__(self, endpoint: Endpoint, usage: Usage) -> None:
        self.endpoint, self.usage = endpoint, usage

    async def __aenter__(self) -> None:
        try:
            self.endpoint.guard.check()
        except BaseUnavailable as error:
            raise self.endpoint._error(str(error)) from None
        self.usage.calls += 1
        self.endpoint.guard.usage.calls += 1

    async def __aexit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        endpoint = self.endpoint
        if error is None or isinstance(error, (GeneratorExit, asyncio.CancelledError)):
            endpoint.guard.succeeded()
        elif isinstance(error, (openai.OpenAIError, json.JSONDecodeError, OSError)) or (
            type(error).__module__.startswith(("httpx", "httpcore", "httpx2"))
        ):
            endpoint.guard.failed()
            raise endpoint._error(endpoint._reason(error)) from None  # type: ignore[arg-type]


def probe(settings: RemoteBase, tokenizer: Any, vocab_size: int) -> RemoteBase:
    """Check an endpoint before anything is loaded.

    Raises:
        UserError: it cannot serve as the base; the message says why.
    """

    async def check() -> RemoteBase:
        endpoint = Endpoint(settings, tokenizer, vocab_size)
        try:
            return await endpoint.probe()
        finally:
            await endpoint.close()

    return asyncio.run(check())
