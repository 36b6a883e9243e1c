"""What an answer says about its tokens: which are certain, what was cut off, what they cost."""

from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

from proxy_vllm.remote_base.steering import Choice
from proxy_vllm.remote_base.usage import Price, Usage

# Where an answer carries its report: the field of vLLM's outputs, and the key in it.
FIELD = "kv_transfer_params"
REPORT_KEY = "proxy"


class Report:
    """Of one request, token by token."""

    def __init__(self) -> None:
        self._certified: list[bool] = []
        self._cut_mass: list[float] = []

    def add(self, choice: Choice) -> None:
        self._certified.append(bool(choice.certified))
        self._cut_mass.append(float(f"{choice.cut_mass:.3g}"))

    def so_far(self, usage: Usage, price: Price | None) -> dict[str, Any]:
        """A copy, since the request may go on."""
        return {
            "certified": list(self._certified),
            "cut_mass": list(self._cut_mass),
            "usage": usage.report(price),
        }


class Reports:
    """The field that outputs carry.

    Every output carries the report so far, because a stop string ends an answer in vLLM's front
    end, which tells the engine core afterwards. Where a request wants several answers, vLLM keeps
    the field of one output: so each carries the reports of all.

    Args:
        states: vLLM's state of each request in the front end, by its id.
        price: of the endpoint's tokens, if it is known.
    """

    def __init__(self, states: Mapping[str, Any], price: Price | None) -> None:
        self._states, self._price = states, price
        self._of_parent: WeakKeyDictionary[Any, list[dict[str, Any] | None]] = WeakKeyDictionary()

    def field(self, request_id: str, report: Report, usage: Usage) -> dict[str, Any]:
        """The report of a request so far, or a list of those of all answers to its prompt."""
        found = report.so_far(usage, self._price)
        state = self._states.get(request_id)
        if state is None or state.parent_req is None:
            return {REPORT_KEY: found}
        parent = state.parent_req
        reports = self._of_parent.setdefault(parent, [None] * parent.n)
        reports[state.request_index] = found
        return {REPORT_KEY: list(reports)}
