"""A base behind HTTP whose distribution is known, with the faults that real endpoints have.

Its logits are a fixed function of the last token ids, so tests know the whole distribution of every
position. It speaks vLLM's dialect with token ids, or names tokens by text.
"""

import asyncio
import json
from collections import Counter
from contextlib import contextmanager

import numpy as np
from remote_base_bench.serving import serving as serving_app
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Route
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

VOCAB = 300
KEY = "sk-secret-7"


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of one token a byte and words on top."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate(letters)}
    for i in range(len(letters), VOCAB):
        vocab[f"Ġword{i}"] = i
    made = Tokenizer(models.WordLevel(vocab, unk_token="!"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made)


def logprobs(ids: list[int], salt: int = 0, spread: float = 2.0) -> np.ndarray:
    """Log-probabilities [VOCAB] of a model's next token, fixed by the last four ids."""
    noise = np.random.default_rng([salt, len(ids), *ids[-4:]])
    logits = noise.normal(size=VOCAB) * spread
    return logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()


def shift(ids: list[int]) -> np.ndarray:
    """Expert less antiexpert [VOCAB]."""
    return logprobs(ids, salt=1, spread=1.5) - logprobs(ids, salt=2, spread=1.5)


class FakeBase:
    """The server.

    Args:
        faults: what happens to the first calls, one a call: a status code, ``hang``, ``cut`` (a
            stream that breaks off), ``json`` (no JSON), ``form`` (another form).
        top: how many log-probabilities it reports at most; more are refused with 400.
        limit: it reports fewer than asked, as some do.
        spoil: half of the rows are the base's choice and a filling, as vLLM's V1 runner gives them
            when another request of its batch asks for tokens by id.
        biased_rows: it reports log-probabilities that ``logit_bias`` has changed.
    """

    def __init__(
        self,
        faults=(),
        top: int = 1000,
        limit: int = 10**6,
        spoil: bool = False,
        biased_rows: bool = False,
    ) -> None:
        self.faults, self.top, self.limit, self.spoil = list(faults), top, limit, spoil
        self.biased_rows = biased_rows
        self.calls: Counter[str] = Counter()
        self.closed_early = 0
        self.keys: set[str | None] = set()
        self.tokenizer = tokenizer()
        self.app = Starlette(
            routes=[
                Route("/v1/models", self.models),
                Route("/v1/completions", self.completions, methods=["POST"]),
            ]
        )

    async def models(self, request: Request) -> JSONResponse:
        return JSONResponse({"data": [{"id": "base", "owned_by": "vllm"}]})

    def name(self, token: int, body: dict) -> str:
        if body.get("return_tokens_as_token_ids"):
            return f"token_id:{token}"
        return self.tokenizer.decode([token])

    def entry(self, ids: list[int], body: dict) -> tuple[int, dict[str, float]]:
        row = logprobs(ids)
        biased = row.copy()
        for token, bias in (body.get("logit_bias") or {}).items():
            biased[int(token)] += bias
        if self.biased_rows:
            row = biased - np.logaddexp.reduce(biased)
        top = np.argsort(-row)[: min(body["logprobs"], self.limit)]
        if body.get("logprob_token_ids"):
            top = np.array(body["logprob_token_ids"])
        token = int(biased.argmax())
        named: dict[str, float] = {}
        if self.spoil and len(ids) % 2 and not body.get("logprob_token_ids"):
            return token, {self.name(token, body): float(row[token]), self.name(0, body): -9999.0}
        for t in [*top.tolist(), token]:
            named.setdefault(self.name(t, body), float(row[t]))
        return token, named

    async def completions(self, request: Request):
        body = await request.json()
        self.keys.add(request.headers.get("authorization"))
        self.calls["stream" if body.get("stream") else "plain"] += 1
        fault = self.faults.pop(0) if self.faults else None
        if isinstance(fault, int):
            headers = {"retry-after": "0.2"} if fault == 429 else {}
            # Some endpoints repeat the key in their errors.
            return JSONResponse(
                {"error": {"message": f"no, {request.headers['authorization']}"}}, fault, headers
            )
        if fault == "hang":
            await asyncio.sleep(30)
        if fault == "json":
            return PlainTextResponse("<html>busy</html>")
        if fault == "form":
            return JSONResponse({"choices": [{"logprobs": {"tokens": ["x"], "top_logprobs": []}}]})
        if body["logprobs"] > self.top:
            return JSONResponse({"error": {"message": f"logprobs: at most {self.top}"}}, 400)
        prompt = body["prompt"]
        if isinstance(prompt, str):
            prompt = self.tokenizer(prompt).input_ids
        if not body.get("stream"):
            prompts = prompt if isinstance(prompt[0], list) else [prompt]
            choices = []
            for index, ids in enumerate(prompts):
                token, row = self.entry(ids, body)
                logs = {"tokens": [self.name(token, body)], "top_logprobs": [row]}
                choices.append({"index": index, "logprobs": logs})
            usage = {"prompt_tokens": sum(map(len, prompts)), "completion_tokens": len(prompts)}
            return JSONResponse({"choices": choices[::-1], "usage": usage})
        return StreamingResponse(self.stream(prompt, body, fault), media_type="text/event-stream")

    async def stream(self, prompt: list[int], body: dict, fault):
        ids, sent = list(prompt), 0
        try:
            for sent in range(body["max_tokens"]):
                if fault == "cut" and sent == 2:
                    raise ConnectionError("cut")
                token, row = self.entry(ids, body)
                logs = {"tokens": [self.name(token, body)], "top_logprobs": [row]}
                yield f"data: {json.dumps({'choices': [{'logprobs': logs}]})}\n\n"
                ids.append(token)
                await asyncio.sleep(0.005)
            yield "data: [DONE]\n\n"
        except asyncio.CancelledError:
            self.closed_early += 1
            raise


@contextmanager
def serving(base: FakeBase):
    """The URL of a running server."""
    with serving_app(base.app) as url:
        yield f"{url}/v1"
