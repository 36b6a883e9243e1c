"""Answers over HTTP that carry the report of a base elsewhere, in streams too.

vLLM copies an output's `kv_transfer_params` into whole answers, of the first prompt alone, and has
no place for it in a stream. Here every choice's report is found, and a stream carries it in the
chunk that ends the choice.
"""

from typing import Any

from starlette.datastructures import State

from proxy_vllm.remote_base.reports import FIELD, REPORT_KEY
from proxy_vllm.server.extra_fields import Extra, let_answers_carry


def report_in_answers(state: State) -> None:
    """Let the server's completions and chats carry reports.

    Args:
        state: of the application, with vLLM's own serving objects.
    """
    let_answers_carry(state, lambda request: _Reports())


class _Reports(Extra):
    """The reports of a request's outputs, by the index of their choice."""

    def __init__(self) -> None:
        self._found: dict[int, Any] = {}

    def see(self, first: int, output: Any) -> None:
        if reports := (output.kv_transfer_params or {}).get(REPORT_KEY):
            listed = reports if isinstance(reports, list) else [reports]
            self._found.update({first + i: report for i, report in enumerate(listed)})

    def wants(self, event: str) -> bool:
        return '"finish_reason":"' in event

    def add_to_chunk(self, chunk: dict[str, Any]) -> None:
        for choice in chunk.get("choices") or ():
            if choice.get("finish_reason") is not None and choice["index"] in self._found:
                chunk[FIELD] = {REPORT_KEY: self._found[choice["index"]]}

    def add_to_answer(self, answer: Any) -> None:
        """One report, or a list of one a choice."""
        if self._found and hasattr(answer, FIELD):
            reports = [self._found.get(i) for i in range(max(self._found) + 1)]
            setattr(answer, FIELD, {REPORT_KEY: reports[0] if len(reports) == 1 else reports})
