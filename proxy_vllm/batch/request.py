"""One line of a batch: a JSON object checked into a request."""

import dataclasses
import functools
import json
import math
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from proxy_vllm.config import ALPHA_KEY, GUIDANCE_KEY, ROLES, ProxyConfig
from proxy_vllm.errors import UserError, one_line
from proxy_vllm.member_alone import MEMBER_KEY
from proxy_vllm.plausibility import BETA_KEY

if TYPE_CHECKING:
    from vllm import SamplingParams

# Fields of `SamplingParams` that belong to vLLM's inner working, or that change the form of a
# result rather than the text.
_INNER_FIELDS = {
    "flat_logprobs",
    "output_kind",
    "output_text_buffer_length",
    "routed_experts_prompt_start",
    "skip_clone",
    "skip_reading_prefix_cache",
    "stream_interval",
}
# How messages are rendered, and, for prompts too, the form that an answer must have.
CHAT_FIELDS = (
    "chat_template_kwargs",
    "tools",
    "continue_final_message",
    "add_generation_prompt",
    "response_format",
)
LORA_KEY = "lora"
_STEERING = (ALPHA_KEY, BETA_KEY, MEMBER_KEY)
_OWN_FIELDS = ("id", "prompt", "messages", *_STEERING, LORA_KEY, *CHAT_FIELDS)


@dataclass(frozen=True)
class LineOptions:
    """How the lines of a job are read and answered.

    Args:
        defaults: fields of lines that do not set them: those of ``SamplingParams``, and
            ``CHAT_FIELDS``.
        token_ids: put ``token_ids`` into the answers.
        keep_fields: copy fields that are none of a request's to the answer; else they are refused.
        tool_parser: vLLM's parser of tool calls, for lines in OpenAI's format.
        adapters: names that ``lora`` may have; None where the engine takes no adapters.
        served: the engine's own names, which ``model`` of lines in OpenAI's format may have too.
    """

    defaults: dict[str, Any] = field(default_factory=dict)
    token_ids: bool = False
    keep_fields: bool = False
    tool_parser: str | None = None
    adapters: tuple[str, ...] | None = None
    served: tuple[str, ...] = ()

    def adapter(self, name: Any) -> str | None:
        """The adapter that a line's ``lora`` names; None for none."""
        if name is None:
            return None
        if self.adapters is None:
            raise UserError(
                f"{LORA_KEY} is {_shown(name)}: this engine has no adapters (--enable-lora)"
            )
        if name not in self.adapters:
            known = ", ".join(self.adapters) or "none"
            raise UserError(f"{LORA_KEY} is {_shown(name)}: --lora-modules names {known}")
        return name

    def adapter_of_model(self, name: Any) -> str | None:
        """The adapter that ``model`` names, as it does on a server; None for the engine itself.

        Without adapters no name is refused, and a foreign one is said once: files are often made
        for another server.
        """
        if name is None or name in self.served:
            return None
        if self.adapters is None:
            from vllm.logger import init_logger

            init_logger(f"vllm.{__name__}").warning_once(
                "Lines name the model %s, and %s answers them (--served-model-name names it)",
                name,
                self.served[0] if self.served else "the engine",
            )
            return None
        if name not in self.adapters:
            known = ", ".join((*self.served, *self.adapters))
            raise UserError(
                f"body.model is {_shown(name)}, which does not exist: there are {known}"
            )
        return name

    def chat_defaults(self, line: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
        """Defaults of ``names`` for a line, arguments of templates completed one by one."""
        found = {name: self.defaults[name] for name in names if name in self.defaults}
        own = line.get("chat_template_kwargs")
        if "chat_template_kwargs" in found and isinstance(own, dict):
            found["chat_template_kwargs"] = {**found["chat_template_kwargs"], **own}
            line["chat_template_kwargs"] = found["chat_template_kwargs"]
        return {name: value for name, value in found.items() if line.get(name) is None}


def is_openai(data: dict[str, Any]) -> bool:
    """Is a line, or an answer, in OpenAI's batch format?"""
    return "response" in data if "body" not in data else "custom_id" in data or "url" in data


def id_of(number: int, data: dict[str, Any]) -> str | int:
    """Id of a line: its own, or its number; ``UserError`` if it is neither text nor integer."""
    if is_openai(data):
        value = data.get("custom_id")
        if not isinstance(value, str) or not value:
            raise UserError(f"custom_id is {_shown(value)}: it must be a string, not empty")
        return value
    value = data.get("id")
    if value is None:
        return number
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise UserError(f"id is {_shown(value)}: it must be a string or an integer")
    return value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


@functools.cache
def sampling_fields() -> dict[str, Any]:
    """A validator (``pydantic.TypeAdapter``) for each field of ``SamplingParams`` that may be set.

    vLLM checks ranges when it builds ``SamplingParams``, but not types.
    """
    from pydantic import TypeAdapter
    from vllm import SamplingParams

    hints = typing.get_type_hints(SamplingParams, include_extras=True)
    return {
        name: TypeAdapter(hints[name])
        for name in SamplingParams.__struct_fields__
        if not name.startswith("_") and name not in _INNER_FIELDS
    }


def request_fields() -> set[str]:
    """Every field that a line may have."""
    return {*_OWN_FIELDS, *sampling_fields()}


def check_field(name: str, value: Any) -> Any:
    """Return ``value`` as the field ``name`` of ``SamplingParams`` wants it, or raise."""
    from pydantic import ValidationError
    from vllm.exceptions import VLLMValidationError

    if name in ("structured_outputs", "repetition_detection") and isinstance(value, dict):
        _check_keys(name, value)
    if not _has_plain_numbers(value):
        raise UserError(f"{name} is {_shown(value)}: numbers must be finite and fit in 64 bits")
    try:
        # The JSON form allows keys of mappings to be integers in quotes, and nothing else loose.
        return sampling_fields()[name].validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{name} is {_shown(value)}: {first['msg'].lower()}") from None
    except VLLMValidationError as error:
        raise UserError(f"{name}: {one_line(error)}") from None


def _check_keys(name: str, value: dict[str, Any]) -> None:
    """vLLM drops keys that it does not know."""
    from vllm.sampling_params import RepetitionDetectionParams, StructuredOutputsParams

    kinds = {
        "structured_outputs": StructuredOutputsParams,
        "repetition_detection": RepetitionDetectionParams,
    }
    known = [field.name for field in dataclasses.fields(kinds[name]) if field.init]
    for key in value:
        if key not in known:
            raise UserError(f"{name}.{key} is not a known field: there are {', '.join(known)}")


def _has_plain_numbers(value: Any) -> bool:
    """Longer integers do not pass to the engine's process, and 1e999 is read as infinity."""
    if isinstance(value, dict):
        return all(map(_has_plain_numbers, value.values()))
    if isinstance(value, list):
        return all(map(_has_plain_numbers, value))
    if isinstance(value, int):
        return -(2**63) <= value < 2**63
    return not isinstance(value, float) or math.isfinite(value)


@dataclass(frozen=True)
class Request:
    """One line, checked.

    ``prompt`` is text or token ids, or either for each model under ``base``, ``expert`` and
    ``antiexpert``; None where ``messages`` are given. ``chat`` are arguments of
    ``ProxyLLM.enqueue_chat``, ``kept`` fields that go into the answer as they are, and ``asked``
    is vLLM's request where the line is in OpenAI's format. ``lora`` names an adapter. ``alpha`` is
    None where one member answers alone.
    """

    id: str | int
    prompt: str | list[int] | dict[str, str | list[int]] | None
    messages: list[Any] | None
    params: "SamplingParams"
    alpha: float | None
    chat: dict[str, Any] = field(default_factory=dict)
    kept: dict[str, Any] = field(default_factory=dict)
    asked: Any = None
    lora: str | None = None


def parse_request(
    number: int, data: dict[str, Any], proxy: ProxyConfig, options: LineOptions | None = None
) -> Request:
    """Check one line and build its sampling parameters.

    Args:
        number: of the line, from 1.
        data: the line's fields; a field that is null counts as absent.
        proxy: gives the default and the range of ``proxy_alpha``.
        options: of the job.

    Raises:
        UserError: naming the field that is unknown, missing, or has a wrong type or value.
    """
    options = options or LineOptions()
    if is_openai(data):
        from proxy_vllm.batch.openai_lines import parse_openai_line

        return parse_openai_line(number, data, proxy, options)
    given = {name: value for name, value in data.items() if value is not None}
    request_id = id_of(number, given)
    kept = {name: value for name, value in given.items() if name not in request_fields()}
    if kept and not options.keep_fields:
        raise UserError(
            f"{next(iter(kept))} is not a known field: there are {', '.join(_OWN_FIELDS)} and the"
            " fields of vllm.SamplingParams (--keep-fields copies others to the answers)"
        )
    if ("prompt" in given) == ("messages" in given):
        raise UserError("prompt or messages: one of them is needed, and not both")
    prompt, messages = given.get("prompt"), given.get("messages")
    if isinstance(prompt, dict):
        prompt = _own_prompts(prompt)
    elif prompt is not None:
        _check_prompt("prompt", prompt)
    else:
        _check_messages(messages)
    fields = {
        name: check_field(name, value) for name, value in given.items() if name in sampling_fields()
    }
    given |= options.chat_defaults(given, CHAT_FIELDS if messages else ("response_format",))
    chat = _chat_arguments(given, messages is not None)
    defaults = {n: v for n, v in options.defaults.items() if n not in CHAT_FIELDS}
    if (form := given.get("response_format")) is not None:
        fields["structured_outputs"] = _structured(form, fields.get("structured_outputs"))
    extra = dict(fields.pop("extra_args", {}))
    extra |= {key: given[key] for key in _STEERING if key in given}
    for key in (ALPHA_KEY, BETA_KEY):
        if isinstance(extra.get(key), str):
            raise UserError(f"{key} is {_shown(extra[key])}: it must be a number")
    alpha = None
    if proxy.member_of(extra) is None:
        alpha = extra[ALPHA_KEY] = proxy.alpha_of(extra)
        extra.pop(GUIDANCE_KEY, None)  # alpha says it
    proxy.beta_of(extra)
    params = sampling_params({**defaults, **fields, "extra_args": extra})
    lora = options.adapter(given.get(LORA_KEY))
    return Request(request_id, prompt, messages, params, alpha, chat, kept, lora=lora)


def check_chat_field(name: str, value: Any) -> Any:
    """Return ``value`` as vLLM's chat route reads the field ``name`` of ``CHAT_FIELDS``."""
    from pydantic import TypeAdapter, ValidationError
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    kind = ChatCompletionRequest.model_fields[name].annotation
    try:
        return TypeAdapter(kind).validate_python(value, strict=isinstance(value, (bool, int, str)))
    except ValidationError as error:
        raise UserError(f"{name} is {_shown(value)}: {one_line(error)}") from None


def _chat_arguments(given: dict[str, Any], chats: bool) -> dict[str, Any]:
    """Arguments of ``ProxyLLM.enqueue_chat`` besides messages and sampling parameters."""
    names = [name for name in CHAT_FIELDS if name != "response_format" and name in given]
    if names and not chats:
        raise UserError(f"{names[0]} is for messages: a prompt is read as it is")
    found = {name: check_chat_field(name, given[name]) for name in names}
    if "tools" in found:
        found["tools"] = [tool.model_dump() for tool in found["tools"]]
    if found.get("continue_final_message") and found.setdefault("add_generation_prompt", False):
        raise UserError("continue_final_message excludes add_generation_prompt")
    return found


def _structured(form: Any, structured: Any) -> Any:
    """``structured_outputs`` with what OpenAI's ``response_format`` asks for."""
    from vllm.entrypoints.generate.base.protocol import structured_outputs_from_response_format

    try:
        return structured_outputs_from_response_format(
            structured, check_chat_field("response_format", form)
        )
    except (ValueError, AssertionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"response_format is {_shown(form)}: {one_line(error)}") from None


def sampling_params(fields: dict[str, Any]) -> "SamplingParams":
    """Build ``SamplingParams``; what vLLM refuses is a ``UserError``."""
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    try:
        return SamplingParams(**fields)
    except (ValueError, TypeError, VLLMValidationError) as error:
        raise UserError(one_line(error)) from None


def _check_prompt(name: str, prompt: Any) -> None:
    if isinstance(prompt, str) and prompt:
        return
    if not isinstance(prompt, list) or not prompt:
        raise UserError(
            f"{name} is {_shown(prompt)}: it must be a string or a list of token ids, not empty"
        )
    for token in prompt:
        if isinstance(token, bool) or not isinstance(token, int):
            raise UserError(f"{name} holds {_shown(token)}: token ids are integers")


def _own_prompts(prompt: dict[str, Any]) -> dict[str, str | list[int]]:
    """A prompt for each model, without those that are null."""
    for role, own in prompt.items():
        if role not in ROLES:
            raise UserError(
                f"prompt.{role} is not a known field: a prompt for each model has"
                f" {', '.join(ROLES)}"
            )
        if own is not None:
            _check_prompt(f"prompt.{role}", own)
    own_prompts = {role: own for role, own in prompt.items() if own is not None}
    if "base" not in own_prompts:
        raise UserError("prompt.base is needed: a model without a prompt reads the base's")
    return own_prompts


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        raise UserError(f"messages is {_shown(messages)}: it must be a list, not empty")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise UserError(f"messages holds {_shown(message)}: it must be an object with a role")
