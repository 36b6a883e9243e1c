"""Explained answers as one static page, which asks nothing of any network."""

import base64
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proxy_vllm.explain.offline import Explanation, totals
from proxy_vllm.explain.tokens import Candidate, TokenExplanation

_TEMPLATE = Path(__file__).with_name("page.html")
_VALUES = ("steered", "base", "expert", "antiexpert")
# Values are stored in hundredths, which is what the page shows.
_SCALE = 100
# A page of this many bytes opens at once on a phone.
LIMIT = 1_000_000


@dataclass(frozen=True)
class Page:
    """A page, and how many of the likeliest tokens it stores of each model."""

    html: str
    top: int


def page(explained: Sequence[Explanation], names: str, top: int, limit: int = LIMIT) -> Page:
    """Write a page of explained answers.

    Args:
        explained: the answers.
        names: what the page says of the models.
        top: how many of the likeliest tokens the answers were explained with. Fewer are stored if
            the page would be larger than ``limit``.
        limit: in bytes; a page of the very tokens of the answers may be larger.
    """
    for stored in range(top, 0, -1):
        made = _page(explained, names, stored)
        if len(made.encode()) < limit:
            break
    return Page(made, stored)


def _page(explained: Sequence[Explanation], names: str, top: int) -> str:
    texts: dict[str, int] = {}
    found = totals(explained)
    data = {
        "names": names,
        "k": top,
        "answers": [
            {
                "id": e.id,
                "prompt": e.prompt,
                "alpha": e.alpha,
                "lora": e.lora,
                "finish": e.finish_reason,
                "tokens": [_packed(token, top, texts) for token in e.tokens],
            }
            for e in explained
        ],
        "totals": {
            "answers": found.answers,
            "tokens": found.tokens,
            "changed": found.changed,
            "raised": [[r.token, r.count, r.changed, r.mean_raise] for r in found.raised],
            "replaced": found.replaced,
        },
        "texts": list(texts),
    }
    packed = zlib.compress(json.dumps(data, separators=(",", ":")).encode(), 9)
    return _TEMPLATE.read_text(encoding="utf-8").replace(
        "@DATA@", base64.b64encode(packed).decode()
    )


def _packed(token: TokenExplanation, top: int, texts: dict[str, int]) -> list[Any]:
    """A token as the page reads it: places of the chosen and the base's, texts, four columns."""
    kept = _kept(token, top)
    ids = [candidate.token_id for candidate in kept]
    columns = [
        [None if (value := getattr(c, name)) is None else round(_SCALE * value) for c in kept]
        for name in _VALUES
    ]
    numbers = [texts.setdefault(candidate.token, len(texts)) for candidate in kept]
    chosen, base = ids.index(token.chosen.token_id), ids.index(token.base_choice)
    return [chosen, base, numbers, *columns]


def _kept(token: TokenExplanation, top: int) -> list[Candidate]:
    """The chosen token and the first ``top`` of both models, in the order of the steered one."""

    def first(name: str) -> set[int]:
        known = [c for c in token.top if getattr(c, name) is not None]
        known.sort(key=lambda c: -getattr(c, name))
        return {c.token_id for c in known[:top]}

    wanted = first("steered") | first("base")
    wanted |= {token.chosen.token_id, token.base_choice, token.steered_choice}
    kept = [c for c in token.top if c.token_id in wanted]
    # Of equals vLLM may name another than stands first here.
    kept.sort(key=lambda c: c.token_id != token.steered_choice)
    return kept
