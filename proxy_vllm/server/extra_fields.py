"""What completions and chats carry beside vLLM's own fields, in whole answers and in streams.

vLLM's serving objects make the answers. Those here share their state, show the engine's outputs to
what a request's answer carries on the way in, and let it write on the way out.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

from starlette.datastructures import State
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion

_EVENT = "data: "


class Extra(ABC):
    """What the answer to one request carries."""

    @abstractmethod
    def see(self, first: int, output: Any) -> None:
        """Note an output of the engine's, whose choices are numbered from ``first`` on."""

    @abstractmethod
    def wants(self, event: str) -> bool:
        """Whether an event of a stream may have something to carry; others are not even parsed."""

    @abstractmethod
    def add_to_chunk(self, chunk: dict[str, Any]) -> None:
        """Write to a chunk of a stream."""

    @abstractmethod
    def add_to_answer(self, answer: Any) -> None:
        """Write to a whole answer, or leave what is vLLM's error as it is."""


# From vLLM's request to what its answer carries; None for nothing.
ExtraOf = Callable[[Any], Extra | None]


def let_answers_carry(state: State, extra_of: ExtraOf) -> None:
    """Let a server's completions and chats carry more, from now on; the first call decides what.

    Args:
        state: of vLLM's HTTP application.
    """
    if not isinstance(state.openai_serving_chat, CarryingChat):
        state.openai_serving_chat = CarryingChat(state.openai_serving_chat, extra_of)
    if not isinstance(state.openai_serving_completion, CarryingCompletion):
        state.openai_serving_completion = CarryingCompletion(
            state.openai_serving_completion, extra_of
        )


class CarryingChat(OpenAIServingChat):
    """``/v1/chat/completions``."""

    def __init__(self, serving: OpenAIServingChat, extra_of: ExtraOf) -> None:
        self.__dict__ = serving.__dict__
        self.extra_of = extra_of

    def chat_completion_stream_generator(  # type: ignore[override]
        self, request: Any, result_generator: Any, *args: Any, **kwargs: Any
    ) -> AsyncGenerator[str, None]:
        make = super().chat_completion_stream_generator
        if (extra := self.extra_of(request)) is None:
            return make(request, result_generator, *args, **kwargs)
        return _added(make(request, _seen(result_generator, extra), *args, **kwargs), extra)

    async def chat_completion_full_generator(
        self, request: Any, result_generator: Any, *args: Any, **kwargs: Any
    ) -> Any:
        make = super().chat_completion_full_generator
        if (extra := self.extra_of(request)) is None:
            return await make(request, result_generator, *args, **kwargs)
        answer = await make(request, _seen(result_generator, extra), *args, **kwargs)
        extra.add_to_answer(answer)
        return answer


class CarryingCompletion(OpenAIServingCompletion):
    """``/v1/completions``."""

    def __init__(self, serving: OpenAIServingCompletion, extra_of: ExtraOf) -> None:
        self.__dict__ = serving.__dict__
        self.extra_of = extra_of

    def completion_stream_generator(  # type: ignore[override]
        self, request: Any, engine_inputs: Any, result_generator: Any, *args: Any, **kwargs: Any
    ) -> AsyncGenerator[str, None]:
        make = super().completion_stream_generator
        if (extra := self.extra_of(request)) is None:
            return make(request, engine_inputs, result_generator, *args, **kwargs)
        results = _seen(result_generator, extra, request.n or 1)
        return _added(make(request, engine_inputs, results, *args, **kwargs), extra)

    def request_output_to_completion_response(
        self, final_res_batch: list, request: Any, *args: Any, **kwargs: Any
    ) -> Any:
        make = super().request_output_to_completion_response
        answer = make(final_res_batch, request, *args, **kwargs)
        if (extra := self.extra_of(request)) is not None:
            for prompt, output in enumerate(final_res_batch):
                extra.see(prompt * (request.n or 1), output)
            extra.add_to_answer(answer)
        return answer


async def _seen(
    results: AsyncGenerator[Any, None], extra: Extra, choices: int = 1
) -> AsyncIterator[Any]:
    """The engine's outputs, which ``extra`` sees.

    Args:
        results: outputs, or each with the number of its prompt, as completions have them.
        choices: answers to each prompt.
    """
    async with aclosing(results):
        async for item in results:
            prompt, output = item if isinstance(item, tuple) else (0, item)
            extra.see(prompt * choices, output)
            yield item


async def _added(events: AsyncGenerator[str, None], extra: Extra) -> AsyncGenerator[str, None]:
    async with aclosing(events):
        async for event in events:
            if event.startswith(_EVENT + "{") and extra.wants(event):
                chunk = json.loads(event.removeprefix(_EVENT))
                extra.add_to_chunk(chunk)
                text = json.dumps(chunk, ensure_ascii=False, separators=(",", ":"))
                event = f"{_EVENT}{text}\n\n"
            yield event
