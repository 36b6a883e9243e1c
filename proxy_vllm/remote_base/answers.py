"""Answers over HTTP that carry the report of a base elsewhere, in streams too.

vLLM copies an output's `kv_transfer_params` into whole answers, of the first prompt alone, and has
no place for it in a stream. Here every choice's report is found, and a stream carries it in the
chunk that ends the choice.
"""

import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

from starlette.datastructures import State
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion

from proxy_vllm.remote_base.reports import FIELD, REPORT_KEY

_EVENT = "data: "


def report_in_answers(state: State) -> None:
    """Let the server's completions and chats carry reports.

    Args:
        state: of the application, with vLLM's own serving objects.
    """
    for name, kind in (
        ("openai_serving_completion", ReportingCompletions),
        ("openai_serving_chat", ReportingChats),
    ):
        serving = getattr(state, name)
        if not isinstance(serving, kind):
            setattr(state, name, kind(serving))


class _Reports:
    """The reports of a request's outputs, by the index of their choice.

    Args:
        answers: for each prompt, ``n``.
    """

    def __init__(self, answers: int) -> None:
        self._answers = answers
        self._found: dict[int, Any] = {}

    def note(self, output: Any, prompt: int = 0) -> Any:
        """Keep the reports of an output of vLLM's; return the output."""
        if reports := (output.kv_transfer_params or {}).get(REPORT_KEY):
            listed = reports if isinstance(reports, list) else [reports]
            first = prompt * self._answers
            self._found.update({first + i: report for i, report in enumerate(listed)})
        return output

    def add_to(self, event: str) -> str:
        """The event of a stream, with the report of the choice that it ends."""
        if not event.startswith(_EVENT) or '"finish_reason":"' not in event:
            return event
        chunk = json.loads(event.removeprefix(_EVENT))
        for choice in chunk.get("choices", []):
            if choice.get("finish_reason") is not None and choice["index"] in self._found:
                chunk[FIELD] = {REPORT_KEY: self._found[choice["index"]]}
                return f"{_EVENT}{json.dumps(chunk, ensure_ascii=False)}\n\n"
        return event

    async def added(self, events: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
        async with aclosing(events):
            async for event in events:
                yield self.add_to(event)

    def all(self) -> dict[str, Any] | None:
        """The field of a whole answer: one report, or a list of one a choice."""
        if not self._found:
            return None
        reports = [self._found.get(i) for i in range(max(self._found) + 1)]
        return {REPORT_KEY: reports[0] if len(reports) == 1 else reports}


class ReportingCompletions(OpenAIServingCompletion):
    """vLLM's completions; made of a serving object that vLLM has set up."""

    def __init__(self, serving: OpenAIServingCompletion) -> None:
        self.__dict__.update(vars(serving))

    def completion_stream_generator(
        self,
        request: Any,
        engine_inputs: Any,
        result_generator: AsyncIterator[tuple[int, Any]],
        *args: Any,
        **kwargs: Any,
    ) -> AsyncGenerator[str, None]:
        reports = _Reports(request.n or 1)

        async def noted() -> AsyncGenerator[tuple[int, Any], None]:
            async for prompt, output in result_generator:
                yield prompt, reports.note(output, prompt)

        events = super().completion_stream_generator(
            request, engine_inputs, noted(), *args, **kwargs
        )
        return reports.added(events)

    def request_output_to_completion_response(
        self, final_res_batch: Any, request: Any, *args: Any, **kwargs: Any
    ) -> Any:
        reports = _Reports(request.n or 1)
        for prompt, output in enumerate(final_res_batch):
            reports.note(output, prompt)
        response = super().request_output_to_completion_response(
            final_res_batch, request, *args, **kwargs
        )
        response.kv_transfer_params = reports.all()
        return response


class ReportingChats(OpenAIServingChat):
    """vLLM's chats; made of a serving object that vLLM has set up."""

    def __init__(self, serving: OpenAIServingChat) -> None:
        self.__dict__.update(vars(serving))

    def chat_completion_stream_generator(
        self, request: Any, result_generator: AsyncIterator[Any], *args: Any, **kwargs: Any
    ) -> AsyncGenerator[str, None]:
        reports = _Reports(request.n or 1)

        async def noted() -> AsyncGenerator[Any, None]:
            async for output in result_generator:
                yield reports.note(output)

        events = super().chat_completion_stream_generator(request, noted(), *args, **kwargs)
        return reports.added(events)
