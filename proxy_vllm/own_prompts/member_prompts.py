"""Text and messages to token ids of each member, checked on the way."""

import copy
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from proxy_vllm.config import ROLES, ProxyConfig
from proxy_vllm.errors import UserError
from proxy_vllm.own_prompts.chat_templates import AUTO
from proxy_vllm.own_prompts.prompts import (
    NEGATIVE_KEY,
    PROMPT_KEYS,
    RESOLVED_KEY,
    check_ids,
    check_parameters,
    names_own_prompts,
    unsupported_reason,
)

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

# Where an engine's input carries the prompts of the small members until parameters take them.
INPUT_KEY = "proxy_prompts"


def check_messages(messages: Any) -> None:
    """Refuse a conversation whose messages are not of OpenAI's form.

    Raises:
        UserError: naming the message, from 0, and what is wrong with it.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise UserError(f"messages is {messages!r}: it must be a list, not empty")
    for number, message in enumerate(messages):
        if not isinstance(message, dict):
            if isinstance(message, (str, int, float, list, tuple)) or message is None:
                raise UserError(f"messages[{number}] is {message!r}: it must be an object")
            continue  # a model of OpenAI's client library
        content = message.get("content")
        if isinstance(content, (list, tuple)):
            if all(isinstance(part, (str, dict)) for part in content):
                continue
        elif content is None or isinstance(content, str):
            continue
        raise UserError(
            f"messages[{number}].content is {content!r}: it must be text or a list of parts"
        )


class MemberPrompts:
    """Reads prompts for the expert and the antiexpert of one engine.

    Each member's text is tokenised by its own tokenizer: an instruct expert may have tokens that
    the base lacks. Ids and text are both accepted wherever a prompt is.
    """

    def __init__(self, vllm_config: "VllmConfig") -> None:
        self.base_config = vllm_config.model_config
        self.proxy = ProxyConfig.from_vllm_config(vllm_config)
        self.unsupported = unsupported_reason(vllm_config)

    @cached_property
    def configs(self) -> "dict[str, ModelConfig]":
        from proxy_vllm.composite.member_configs import member_model_config

        small = {
            role: member_model_config(role, self.proxy, self.base_config) for role in PROMPT_KEYS
        }
        return {"base": self.base_config, **small}

    def tokenizer(self, role: str) -> Any:
        from vllm.tokenizers import cached_tokenizer_from_config

        if self.base_config.skip_tokenizer_init:
            raise UserError(f"{self._name(role)} is text, but this engine has no tokenizers")
        return cached_tokenizer_from_config(self.configs[role])

    def ids(self, role: str, value: Any, add_special_tokens: bool = True) -> list[int]:
        """Token ids of one member's prompt.

        Args:
            value: text, token ids, or ``{"prompt": text}`` or ``{"prompt_token_ids": ids}``. Ids
                are the base's, also where a tokenizer map gives the member's own other numbers.
            add_special_tokens: to text, such as the beginning of text.

        Raises:
            UserError: a prompt that the member cannot read, or that leaves no room for an answer.
        """
        if isinstance(value, dict):
            value = value.get("prompt_token_ids", value.get("prompt"))
        if isinstance(value, str):
            try:
                encoded = self.tokenizer(role).encode(value, add_special_tokens=add_special_tokens)
                moves = self.proxy.moved_tokens(role)
                value = [moves.get(index, index) for index in encoded]
            except (TypeError, ValueError) as error:  # half of a surrogate pair
                raise UserError(f"{self._name(role)} is no text that can be encoded") from error
        ids = check_ids(self._name(role), value)
        self.check(role, ids)
        return ids

    def check(self, role: str, ids: Sequence[int]) -> None:
        """Refuse token ids that the member does not have, and prompts without room for an answer.

        Raises:
            UserError: naming the member.
        """
        vocab_size = self.configs[role].get_vocab_size()
        if max(ids) >= vocab_size:
            raise UserError(
                f"{self._name(role)} holds token id {max(ids)}, but its vocabulary ends at"
                f" {vocab_size - 1}"
            )
        limit = self.base_config.max_model_len
        if len(ids) >= limit:
            raise UserError(
                f"{self._name(role)} has {len(ids)} tokens, and prompt and answer together may"
                f" have {limit}: shorten the prompt, or raise --max-model-len"
            )

    def _name(self, role: str) -> str:
        """What the user calls a member's prompt."""
        negative = role == "antiexpert" and self.proxy.guided
        return NEGATIVE_KEY if negative else f"the {role}'s prompt"

    def of_prompt(self, prompt: Any, add_special_tokens: bool = True) -> dict[str, list[int]]:
        """Ids of the small members' prompts in ``{"base": …, "expert": …, "antiexpert": …}``."""
        if unknown := sorted(set(prompt) - set(ROLES)):
            raise UserError(f"a prompt for each model has the keys {', '.join(ROLES)}: {unknown}")
        if prompt.get("base") is None:
            raise UserError("a prompt for each model needs a `base`")
        return {
            key: self.ids(role, prompt[role], add_special_tokens)
            for role, key in PROMPT_KEYS.items()
            if prompt.get(role) is not None
        }

    @property
    def has_templates(self) -> bool:
        return any(self.proxy.chat_template_of(role) is not None for role in PROMPT_KEYS)

    def of_chat(
        self,
        messages: list[Any],
        template_kwargs: dict[str, Any],
        *,
        tools: list[dict[str, Any]] | None = None,
        add_special_tokens: bool = False,
    ) -> dict[str, list[int]]:
        """Ids of the prompts of those small members that have a chat template of their own.

        Args:
            messages: a conversation in OpenAI's form, of text.
            template_kwargs: what the templates are told: ``add_generation_prompt``, …
            tools: in OpenAI's form.
            add_special_tokens: beside those that a template writes itself.

        Raises:
            UserError: a message that is no text, or a template that refuses the conversation.
        """
        from vllm.renderers.chat_utils import has_non_text_content

        if has_non_text_content(messages):
            raise UserError("own chat templates read text only, and a message holds something else")
        prompts = {}
        for role, key in PROMPT_KEYS.items():
            template = self.proxy.chat_template_of(role)
            if template is None:
                continue
            try:
                rendered = self._render(role, template, messages, tools, template_kwargs)
            except Exception as error:
                reason = " ".join(str(error).split())
                raise UserError(f"the {role}'s chat template fails: {reason}") from error
            prompts[key] = self.ids(role, rendered, add_special_tokens)
        return prompts

    def _render(
        self,
        role: str,
        template: str,
        messages: list[Any],
        tools: list[dict[str, Any]] | None,
        template_kwargs: dict[str, Any],
    ) -> str | list[int]:
        """A conversation as one member reads it: text, or token ids of Mistral's own tokenizer."""
        from vllm.renderers.chat_utils import parse_chat_messages
        from vllm.renderers.hf import safe_apply_chat_template
        from vllm.renderers.mistral import safe_apply_chat_template as apply_mistral
        from vllm.utils.mistral import is_mistral_tokenizer

        config, tokenizer = self.configs[role], self.tokenizer(role)
        # A copy: vLLM parses the arguments of tool calls in place.
        messages = copy.deepcopy(messages)
        if is_mistral_tokenizer(tokenizer):
            if template != AUTO:
                raise UserError("Mistral's own tokenizer reads no Jinja; name auto")
            return apply_mistral(tokenizer, messages, tools=tools, **template_kwargs)
        conversation, _, _ = parse_chat_messages(messages, config, content_format="string")
        return safe_apply_chat_template(
            config,
            tokenizer,
            conversation,
            tools=tools,
            chat_template=None if template == AUTO else template,
            tokenize=False,
            **template_kwargs,
        )

    def add_to(
        self,
        params: Any,
        prompts: dict[str, list[int]] | None = None,
        add_special_tokens: bool = True,
    ) -> Any:
        """Parameters with checked prompts of token ids, copied if they had to change.

        Args:
            params: of the request; ``extra_args`` may name prompts.
            prompts: what its prompt or its messages gave; what ``extra_args`` names comes first.
            add_special_tokens: to what ``extra_args`` names as text.

        Raises:
            UserError: an engine that cannot run them, or a request that must not have them.
        """
        extra_args = getattr(params, "extra_args", None) or {}
        if RESOLVED_KEY in extra_args:
            raise UserError(f"{RESOLVED_KEY} is not for requests to set")
        guided = self.proxy.guided
        if not prompts and not names_own_prompts(extra_args) and not guided:
            return params
        if extra_args.get(NEGATIVE_KEY) is not None and not guided:
            raise UserError(f"{NEGATIVE_KEY} is for --method cfg")
        if self.unsupported is not None:
            raise UserError(f"a prompt for each model: {self.unsupported}")
        check_parameters(params, guided)
        named = {**(prompts or {}), **extra_args}
        if (negative := named.pop(NEGATIVE_KEY, None)) is not None:
            key = PROMPT_KEYS["antiexpert"]
            if extra_args.get(key) is not None:
                raise UserError(f"{NEGATIVE_KEY} and {key} are one prompt: leave {key} out")
            named[key] = negative
        if guided and named.get(PROMPT_KEYS["expert"]) is not None:
            raise UserError(
                "--method cfg: the expert is the base and reads its prompt; leave it out"
            )
        for role, key in PROMPT_KEYS.items():
            if named.get(key) is not None:
                named[key] = self.ids(role, named[key], add_special_tokens)
        params = copy.copy(params)
        params.extra_args = named
        return params
