"""The field ``proxy_explain`` of completions and chats, of requests that ask."""

from typing import Any

from proxy_vllm.config import ProxyConfig
from proxy_vllm.explain.front_end import let_explain, positions
from proxy_vllm.explain.request import EXPLAIN_KEY
from proxy_vllm.server.extra_fields import Extra, let_answers_carry

FIELD = EXPLAIN_KEY


def let_answers_explain(state: Any, proxy: ProxyConfig) -> None:
    """Let requests to a server's completions and chats be explained, from now on.

    Args:
        state: of vLLM's HTTP application.
    """
    let_explain(state.engine_client, proxy)
    let_answers_carry(state, _explanations_of)


def _explanations_of(request: Any) -> "_Explanations | None":
    return _Explanations() if (request.vllm_xargs or {}).get(EXPLAIN_KEY) else None


class _Explanations(Extra):
    """Entries of each choice that no chunk has carried yet, by its index."""

    def __init__(self) -> None:
        self._found: dict[int, list[dict[str, Any]]] = {}

    def see(self, first: int, output: Any) -> None:
        for index, explanation in positions(output.outputs):
            self._found.setdefault(first + index, []).append(explanation.to_dict())

    def wants(self, event: str) -> bool:
        return bool(self._found)

    def add_to_chunk(self, chunk: dict[str, Any]) -> None:
        for choice in chunk.get("choices") or ():
            # The first chunk of a chat names the role. It is sent when the first token is there,
            # whose text comes with the next.
            opening = "role" in (choice.get("delta") or ()) and not choice.get("finish_reason")
            if not opening and (entries := self._found.pop(choice["index"], None)):
                choice[FIELD] = entries

    def add_to_answer(self, answer: Any) -> None:
        for choice in getattr(answer, "choices", ()):
            setattr(choice, FIELD, self._found.get(choice.index, []))
