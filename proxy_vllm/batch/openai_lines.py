"""Lines in OpenAI's batch format: read with vLLM's protocol classes, answered as its server does.

A line is ``{"custom_id", "method": "POST", "url", "body"}`` and its answer
``{"id", "custom_id", "response": {"status_code", "request_id", "body"}, "error"}``. As in the files
of vLLM's `run-batch`, ``body`` is what the server's route at ``url`` takes.
"""

import dataclasses
import time
from collections.abc import Coroutine
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from proxy_vllm.batch.request import CHAT_FIELDS, LineOptions, Request, id_of
from proxy_vllm.config import ALPHA_KEY, ProxyConfig
from proxy_vllm.errors import UserError, one_line
from proxy_vllm.explain.request import EXPLAIN_KEY, asked_top
from proxy_vllm.member_alone import MEMBER_KEY
from proxy_vllm.plausibility import BETA_KEY

if TYPE_CHECKING:
    from vllm import RequestOutput, SamplingParams

    from proxy_vllm.llm import ProxyLLM

_CHAT, _COMPLETIONS = "/v1/chat/completions", "/v1/completions"
_FIELDS = ("custom_id", "method", "url", "body")
_XARGS = "vllm_xargs"


def parse_openai_line(
    number: int, data: dict[str, Any], proxy: ProxyConfig, options: LineOptions
) -> Request:
    """Check one line.

    Args:
        number: of the line, from 1.
        data: the line's fields.
        proxy: gives the default and the range of ``proxy_alpha``, which stands in ``vllm_xargs``.
        options: of the job; its defaults hold for bodies too.

    Raises:
        UserError: naming the field that is unknown, missing, or has a wrong type or value.
    """
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.exceptions import VLLMValidationError

    for name in data:
        if name not in _FIELDS:
            raise UserError(f"{name} is not a known field: there are {', '.join(_FIELDS)}")
    request_id = id_of(number, data)
    url, method, body = data.get("url"), data.get("method", "POST"), data["body"]
    if method != "POST":
        raise UserError(f"method is {method!r}: it must be POST")
    if url not in (_CHAT, _COMPLETIONS):
        raise UserError(f"url is {url!r}: there are {_CHAT} and {_COMPLETIONS}")
    if not isinstance(body, dict):
        raise UserError("body must be an object")
    for key in (ALPHA_KEY, BETA_KEY, MEMBER_KEY):
        if key in body:
            raise UserError(f'{key} belongs in {_XARGS}: {{"{key}": ...}}')
    names = CHAT_FIELDS if url == _CHAT else ("response_format",)
    body = {**options.chat_defaults(body, names), **body}
    # Not OpenAI's defaults: 16 for a prompt, and all that fits for a chat.
    if (
        not {"max_tokens", "max_completion_tokens"} & body.keys()
        and "max_tokens" in options.defaults
    ):
        body["max_tokens"] = options.defaults["max_tokens"]
    try:
        asked = (ChatCompletionRequest if url == _CHAT else CompletionRequest).model_validate(body)
        for name in ("stream", "use_beam_search", "chat_template", "prompt_embeds"):
            if getattr(asked, name, None):
                raise UserError(f"body.{name} is for the server: leave it out")
        member = proxy.member_of(asked.vllm_xargs)
        alpha = proxy.alpha_of(asked.vllm_xargs) if member is None else None
        proxy.beta_of(asked.vllm_xargs)
        if asked_top(asked.vllm_xargs) is not None:
            raise UserError(f"{EXPLAIN_KEY} is for the server and for `proxy-vllm explain`")
        params = _params(asked, options.defaults)
    except UserError:
        raise
    except (ValueError, TypeError, VLLMValidationError) as error:
        raise UserError(f"body: {one_line(error)}") from None
    prompt, messages, chat = None, None, {}
    if url == _CHAT:
        messages, chat = list(asked.messages), _chat_arguments(asked)
    else:
        prompt = _one_prompt(asked.prompt)
    lora = options.adapter_of_model(asked.model)
    return Request(request_id, prompt, messages, params, alpha, chat=chat, asked=asked, lora=lora)


def _params(asked: Any, defaults: dict[str, Any]) -> "SamplingParams":
    most = getattr(asked, "max_completion_tokens", None)
    params = asked.to_sampling_params(asked.max_tokens if most is None else most, defaults)
    params.seed = defaults.get("seed") if params.seed is None else params.seed
    return params


def _chat_arguments(asked: Any) -> dict[str, Any]:
    """What ``ProxyLLM.enqueue_chat`` takes besides messages and sampling parameters."""
    kwargs = asked.build_chat_params(None, "auto").chat_template_kwargs
    own = ("add_generation_prompt", "continue_final_message")
    given = {"add_special_tokens", "truncate_prompt_tokens"} & asked.model_fields_set
    return {
        **{name: kwargs[name] for name in own},
        "chat_template_kwargs": {k: v for k, v in kwargs.items() if v is not None and k not in own},
        "tools": [tool.model_dump() for tool in asked.tools] if asked.tools else None,
        "tokenization_kwargs": {name: getattr(asked, name) for name in given} or None,
    }


def _one_prompt(prompt: Any) -> str | list[int]:
    several = isinstance(prompt, list) and prompt and not isinstance(prompt[0], int)
    if several and len(prompt) == 1:
        prompt = prompt[0]
    if not prompt or (several and not isinstance(prompt, (str, list))):
        raise UserError("body.prompt must be text or token ids, not empty")
    if several and not isinstance(prompt, str) and not isinstance(prompt[0], int):
        raise UserError(f"body.prompt holds {len(prompt)} prompts: write a line for each")
    return prompt


class OpenAIAnswers:
    """Makes answers out of an engine's outputs, by vLLM's own code behind the server's routes.

    Args:
        llm: the engine.
        tool_parser: vLLM's parser of tool calls, by name; None to leave them in the text.
    """

    def __init__(self, llm: "ProxyLLM", tool_parser: str | None) -> None:
        from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
        from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion

        engine = llm.llm_engine
        client: Any = SimpleNamespace(
            model_config=engine.model_config,
            vllm_config=engine.vllm_config,
            renderer=engine.renderer,
            input_processor=engine.input_processor,
        )
        unused: Any = None
        self._completions = OpenAIServingCompletion(
            client, unused, online_renderer=unused, request_logger=None
        )
        self._chats = OpenAIServingChat(
            client,
            unused,
            "assistant",
            online_renderer=unused,
            request_logger=None,
            chat_template=None,
            chat_template_content_format="auto",
            reasoning_parser=engine.vllm_config.structured_outputs_config.reasoning_parser,
            enable_auto_tools=tool_parser is not None,
            tool_parser=tool_parser,
        )
        self._tool_parser = tool_parser
        self._tokenizer: Any = engine.renderer.tokenizer
        served = engine.model_config.served_model_name
        self._model = served[0] if isinstance(served, list) else served or engine.model_config.model

    def prepare(self, request: Request, defaults: dict[str, Any]) -> Request:
        """Let the parsers have their say in a chat's sampling parameters, as the server does."""
        asked = request.asked
        if request.messages is None:
            return request
        if asked.tool_choice not in (None, "none") and self._tool_parser is None:
            raise UserError("body.tools need --tool-call-parser, or tool_choice none")
        parser = self._parser(asked)
        if parser is None:
            return request
        asked = parser.adjust_request(request=asked)
        return dataclasses.replace(request, asked=asked, params=_params(asked, defaults))

    def _parser(self, asked: Any) -> Any:
        chats = self._chats
        if chats.parser_cls is None:
            return None
        kwargs = chats._effective_chat_template_kwargs(asked)
        return chats._make_parser(asked, self._tokenizer, kwargs)

    def answer(self, number: int, request: Request, output: "RequestOutput") -> dict[str, Any]:
        """The line of a finished request."""
        from vllm.entrypoints.generate.base.protocol import RequestResponseMetadata

        asked, model = request.asked, request.lora or self._model
        if request.messages is None:
            response: Any = self._completions.request_output_to_completion_response(
                [output],
                asked,
                f"cmpl-{number}",
                int(time.time()),
                model,
                self._tokenizer,
                RequestResponseMetadata(request_id=f"cmpl-{number}"),
            )
        else:
            response = _without_waiting(
                self._chats.chat_completion_full_generator(
                    asked,
                    _one(output),
                    f"chatcmpl-{number}",
                    model,
                    asked.messages,
                    self._tokenizer,
                    RequestResponseMetadata(request_id=f"chatcmpl-{number}"),
                    parser=self._parser(asked),
                )
            )
        return _line(number, request.id, 200, response.model_dump(mode="json"), None)


async def _one(output: "RequestOutput") -> Any:
    yield output


def _without_waiting(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """The result of a coroutine that waits for nothing."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value
    raise RuntimeError("vLLM's response generator waits for something")


def refusal(number: int, request_id: str | int | None, reason: str) -> dict[str, Any]:
    """The line of a request that could not be answered."""
    error = {"message": reason, "type": "BadRequestError", "param": None, "code": 400}
    return _line(number, request_id, 400, None, {"error": error})


def _line(number: int, custom_id: Any, status: int, body: Any, error: Any) -> dict[str, Any]:
    return {
        "id": f"batch_req_{number}",
        "custom_id": custom_id,
        "response": {"status_code": status, "request_id": f"req_{number}", "body": body},
        "error": error,
    }
