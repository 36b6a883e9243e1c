"""What steering changes, token by token (docs/explain.md).

| module | what it holds |
|---|---|
| `request.py` | how a request asks, and what it is refused for |
| `scores.py` | in the worker: log-probabilities of each member at a few tokens |
| `columns.py` | how they travel beside vLLM's log-probabilities |
| `tokens.py` | what users get for one token |
| `front_end.py` | from columns to tokens, in vLLM's front end |
| `serving.py` | the extra field of completions and chats |
| `offline.py`, `page.py` | explained answers as a whole, and as a page |
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from proxy_vllm.explain.front_end import explanations
    from proxy_vllm.explain.offline import Explanation, Totals, totals
    from proxy_vllm.explain.tokens import Candidate, TokenExplanation

__all__ = ["Candidate", "Explanation", "TokenExplanation", "Totals", "explanations", "totals"]

# Commands that need no vLLM read `request.py`.
_LAZY = {
    "Candidate": "proxy_vllm.explain.tokens",
    "Explanation": "proxy_vllm.explain.offline",
    "TokenExplanation": "proxy_vllm.explain.tokens",
    "Totals": "proxy_vllm.explain.offline",
    "totals": "proxy_vllm.explain.offline",
    "explanations": "proxy_vllm.explain.front_end",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
