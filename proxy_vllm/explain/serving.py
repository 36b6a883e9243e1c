"""The field ``proxy_explain`` of completions and chats.

vLLM's serving objects make the answers. Those here share their state, see the engine's outputs on
the way in, and add the field on the way out, to requests that ask.
"""

import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion

from proxy_vllm.config import ProxyConfig
from proxy_vllm.explain.front_end import explanations, let_explain
from proxy_vllm.explain.request import EXPLAIN_KEY

FIELD = EXPLAIN_KEY
# Entries of each choice, by its index.
Found = dict[int, list[dict[str, Any]]]


class ExplainingChat(OpenAIServingChat):
    """``/v1/chat/completions``."""

    def __init__(self, serving: OpenAIServingChat) -> None:
        self.__dict__ = serving.__dict__

    def chat_completion_stream_generator(  # type: ignore[override]
        self, request: Any, result_generator: Any, *args: Any, **kwargs: Any
    ) -> AsyncGenerator[str, None]:
        make = super().chat_completion_stream_generator
        if not _asks(request):
            return make(request, result_generator, *args, **kwargs)
        found: Found = {}
        return _add_to_chunks(make(request, _seen(result_generator, found), *args, **kwargs), found)

    async def chat_completion_full_generator(
        self, request: Any, result_generator: Any, *args: Any, **kwargs: Any
    ) -> Any:
        make = super().chat_completion_full_generator
        if not _asks(request):
            return await make(request, result_generator, *args, **kwargs)
        found: Found = {}
        answer = await make(request, _seen(result_generator, found), *args, **kwargs)
        return _add_to_answer(answer, found)


class ExplainingCompletion(OpenAIServingCompletion):
    """``/v1/completions``."""

    def __init__(self, serving: OpenAIServingCompletion) -> None:
        self.__dict__ = serving.__dict__

    def completion_stream_generator(  # type: ignore[override]
        self, request: Any, engine_inputs: Any, result_generator: Any, *args: Any, **kwargs: Any
    ) -> AsyncGenerator[str, None]:
        make = super().completion_stream_generator
        if not _asks(request):
            return make(request, engine_inputs, result_generator, *args, **kwargs)
        found: Found = {}
        results = _seen(result_generator, found, request.n or 1)
        return _add_to_chunks(make(request, engine_inputs, results, *args, **kwargs), found)

    def request_output_to_completion_response(
        self, final_res_batch: list, request: Any, *args: Any, **kwargs: Any
    ) -> Any:
        answer = super().request_output_to_completion_response(
            final_res_batch, request, *args, **kwargs
        )
        if not _asks(request):
            return answer
        outputs = (output for result in final_res_batch for output in result.outputs)
        return _add_to_answer(answer, {i: _entries(output) for i, output in enumerate(outputs)})


def let_answers_explain(state: Any, proxy: ProxyConfig) -> None:
    """Let requests to a server's completions and chats be explained, from now on.

    Args:
        state: of vLLM's HTTP application.
    """
    let_explain(state.engine_client, proxy)
    if not isinstance(state.openai_serving_chat, ExplainingChat):
        state.openai_serving_chat = ExplainingChat(state.openai_serving_chat)
    if not isinstance(state.openai_serving_completion, ExplainingCompletion):
        state.openai_serving_completion = ExplainingCompletion(state.openai_serving_completion)


def _asks(request: Any) -> bool:
    return bool((request.vllm_xargs or {}).get(EXPLAIN_KEY))


def _entries(output: Any) -> list[dict[str, Any]]:
    return [explanation.to_dict() for explanation in explanations(output)]


async def _seen(
    results: AsyncGenerator[Any, None], found: Found, choices: int = 1
) -> AsyncIterator[Any]:
    """The engine's outputs, which leave their explanations in ``found``.

    Args:
        results: outputs, or each with the number of its prompt, as completions have them.
        choices: answers to each prompt.
    """
    async with aclosing(results):
        async for item in results:
            prompt, result = item if isinstance(item, tuple) else (0, item)
            for output in result.outputs:
                if entries := _entries(output):
                    found.setdefault(prompt * choices + output.index, []).extend(entries)
            yield item


async def _add_to_chunks(
    chunks: AsyncGenerator[str, None], found: Found
) -> AsyncGenerator[str, None]:
    """Put into each chunk what was found since the last one of its choice."""
    async with aclosing(chunks):
        async for chunk in chunks:
            yield _add_to_chunk(chunk, found) if found else chunk


def _add_to_chunk(chunk: str, found: Found) -> str:
    start, _, body = chunk.partition("data: ")
    if not body.startswith("{"):
        return chunk
    data = json.loads(body)
    for choice in data.get("choices") or ():
        # The first chunk of a chat names the role. It is sent when the first token is there, whose
        # text comes with the next.
        opening = "role" in (choice.get("delta") or ()) and not choice.get("finish_reason")
        if not opening and (entries := found.pop(choice["index"], None)):
            choice[FIELD] = entries
    return f"{start}data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _add_to_answer(answer: Any, found: Found) -> Any:
    for choice in getattr(answer, "choices", ()):  # an error has none
        setattr(choice, FIELD, found.get(choice.index, []))
    return answer
