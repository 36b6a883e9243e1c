#!/usr/bin/env python
"""Proxy-tuning from outside: three OpenAI servers, their top logprobs combined in the client.

    python scripts/remote_logprobs.py --base URL --expert URL --antiexpert URL --tokenizer BASE \
        --max-tokens 32 "The first prompt" "A second"

Each server is plain vLLM, started with `--max-logprobs 100`. At every token the client asks all
three for the next token's 100 largest logprobs, takes the base's candidates, combines and sends the
chosen token back. It approximates: a candidate that a small model does not report gets the least
logprob that this model did report, and tokens outside the base's candidates cannot be chosen. With
as many logprobs as there are tokens it is exact. A benchmark peer, not a way to serve.
"""

import argparse
import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import httpx


def combine(
    base: dict[int, float],
    expert: dict[int, float],
    antiexpert: dict[int, float],
    alpha: float,
) -> dict[int, float]:
    """Scores of the base's candidates: base + alpha * (expert - antiexpert), in logprobs.

    A logprob is the logit less a constant of its row, so the order is that of the logits.
    """
    least = {id(row): min(row.values()) for row in (expert, antiexpert)}

    def of(row: dict[int, float], token: int) -> float:
        return row.get(token, least[id(row)])

    return {t: b + alpha * (of(expert, t) - of(antiexpert, t)) for t, b in base.items()}


class Member:
    """One server; rows of a batch go in one request."""

    def __init__(self, url: str, model: str, logprobs: int) -> None:
        self.client = httpx.Client(base_url=url, timeout=600)
        self.model, self.logprobs = model, logprobs

    def next(self, rows: list[list[int]]) -> list[dict[int, float]]:
        """For each row of token ids, the largest logprobs of its next token."""
        body = {
            "model": self.model, "prompt": rows, "max_tokens": 1, "temperature": 0,
            "logprobs": self.logprobs, "ignore_eos": True, "return_tokens_as_token_ids": True,
        }  # fmt: skip
        answer = self.client.post("/v1/completions", json=body)
        if answer.is_error:
            raise SystemExit(f"{self.client.base_url}: {answer.status_code} {answer.text[:500]}")
        choices = sorted(answer.json()["choices"], key=lambda c: c["index"])
        top = [c["logprobs"]["top_logprobs"][0] for c in choices]
        return [{int(name.split(":")[1]): value for name, value in row.items()} for row in top]


@dataclass
class Generated:
    """Chosen tokens, and the seconds from the start at which each was known."""

    tokens: list[list[int]]
    times: list[float] = field(default_factory=list)


def generate(
    urls: dict[str, str],
    prompts: list[list[int]],
    max_tokens: int,
    *,
    alpha: float = 1.0,
    logprobs: int = 100,
    model: str = "model",
) -> Generated:
    """Greedy continuation of a batch, `max_tokens` each."""
    members = [Member(urls[role], model, logprobs) for role in ("base", "expert", "antiexpert")]
    out = Generated([[] for _ in prompts])
    begun = time.perf_counter()
    with ThreadPoolExecutor(3) as pool:
        for _ in range(max_tokens):
            rows = [[*p, *t] for p, t in zip(prompts, out.tokens)]
            answers = list(pool.map(lambda m, rows=rows: m.next(rows), members))
            for tokens, *three in zip(out.tokens, *answers, strict=True):
                scores = combine(*three, alpha)
                # The smaller id where two are equal, as argmax does.
                tokens.append(min(scores, key=lambda t: (-scores[t], t)))
            out.times.append(time.perf_counter() - begun)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for role in ("base", "expert", "antiexpert"):
        parser.add_argument(f"--{role}", required=True, help=f"URL of the {role}'s server")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--model", default="model", help="the name under which all three serve")
    parser.add_argument("--alpha", type=float, default=1.0)
    parser.add_argument("--logprobs", type=int, default=100)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("prompts", nargs="+")
    args = parser.parse_args()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    out = generate(
        {role: getattr(args, role) for role in ("base", "expert", "antiexpert")},
        [tokenizer(text).input_ids for text in args.prompts],
        args.max_tokens,
        alpha=args.alpha, logprobs=args.logprobs, model=args.model,
    )  # fmt: skip
    for text, tokens in zip(args.prompts, out.tokens):
        print(json.dumps({"prompt": text, "text": tokenizer.decode(tokens)}))


if __name__ == "__main__":
    main()
