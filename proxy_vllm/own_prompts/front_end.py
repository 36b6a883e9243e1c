"""Front end of own prompts: text and messages to token ids of each member, checked on the way."""

import copy
from functools import cached_property
from typing import TYPE_CHECKING, Any

from proxy_vllm.config import ROLES, ProxyConfig
from proxy_vllm.errors import UserError
from proxy_vllm.own_prompts.chat_templates import AUTO
from proxy_vllm.own_prompts.prompts import (
    PROMPT_KEYS,
    RESOLVED_KEY,
    check_ids,
    check_parameters,
    names_own_prompts,
    obstacle,
)

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

# Where an engine's input carries the prompts of the small members until parameters take them.
INPUT_KEY = "proxy_prompts"


class MemberPrompts:
    """Reads prompts for the expert and the antiexpert of one engine.

    Each member's text is tokenised by its own tokenizer: an instruct expert may have tokens that
    the base lacks. Ids and text are both accepted wherever a prompt is.
    """

    def __init__(self, vllm_config: "VllmConfig") -> None:
        self.base_config = vllm_config.model_config
        self.proxy = ProxyConfig.from_vllm_config(vllm_config)
        self.obstacle = obstacle(vllm_config)

    @cached_property
    def configs(self) -> "dict[str, ModelConfig]":
        from proxy_vllm.members import member_model_config

        return {
            role: member_model_config(role, self.proxy, self.base_config) for role in PROMPT_KEYS
        }

    def tokenizer(self, role: str) -> Any:
        from vllm.tokenizers import cached_tokenizer_from_config

        if self.base_config.skip_tokenizer_init:
            raise UserError(f"the {role}'s prompt is text, but this engine has no tokenizers")
        return cached_tokenizer_from_config(self.configs[role])

    def ids(self, role: str, value: Any, add_special_tokens: bool = True) -> list[int]:
        """Token ids of one member's prompt.

        Args:
            value: text, token ids, or ``{"prompt": text}`` or ``{"prompt_token_ids": ids}``.

        Raises:
            UserError: a prompt that the member cannot read, or that leaves no room for an answer.
        """
        if isinstance(value, dict):
            value = value.get("prompt_token_ids", value.get("prompt"))
        if isinstance(value, str):
            value = self.tokenizer(role).encode(value, add_special_tokens=add_special_tokens)
        ids = check_ids(f"the {role}'s prompt", value)
        vocab_size = self.configs[role].get_vocab_size()
        if max(ids) >= vocab_size:
            raise UserError(
                f"the {role}'s prompt holds token id {max(ids)}, but its vocabulary ends at"
                f" {vocab_size - 1}"
            )
        limit = self.base_config.max_model_len
        if len(ids) >= limit:
            raise UserError(
                f"the {role}'s prompt has {len(ids)} tokens, and prompt and answer together may"
                f" have {limit}: shorten the prompt, or raise --max-model-len"
            )
        return ids

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

    def of_chat(self, messages: list[Any], **options: Any) -> dict[str, list[int]]:
        """Ids of the prompts of those small members that have a chat template of their own.

        Args:
            messages: a conversation in OpenAI's form, of text.
            options: of ``apply_chat_template``: ``add_generation_prompt``, ``tools``, …
        """
        texts = [_text_message(message) for message in messages]
        prompts = {}
        for role, key in PROMPT_KEYS.items():
            template = self.proxy.chat_template_of(role)
            if template is None:
                continue
            try:
                text = self.tokenizer(role).apply_chat_template(
                    texts,
                    chat_template=None if template == AUTO else template,
                    tokenize=False,
                    **options,
                )
            except Exception as error:
                reason = " ".join(str(error).split())
                raise UserError(f"the {role}'s chat template fails: {reason}") from error
            # The template writes the beginning of text itself.
            prompts[key] = self.ids(role, text, add_special_tokens=False)
        return prompts

    def admit(self, params: Any, prompts: dict[str, list[int]] | None = None) -> Any:
        """Parameters with checked prompts of token ids, copied if they had to change.

        Args:
            params: of the request; ``extra_args`` may name prompts.
            prompts: what its prompt or its messages gave; what ``extra_args`` names comes first.
        """
        extra_args = getattr(params, "extra_args", None) or {}
        if RESOLVED_KEY in extra_args:
            raise UserError(f"{RESOLVED_KEY} is not for requests to set")
        if not prompts and not names_own_prompts(extra_args):
            return params
        if self.obstacle is not None:
            raise UserError(f"a prompt for each model: {self.obstacle}")
        check_parameters(params)
        named = {**(prompts or {}), **extra_args}
        for role, key in PROMPT_KEYS.items():
            if named.get(key) is not None:
                named[key] = self.ids(role, named[key])
        params = copy.copy(params)
        params.extra_args = named
        return params


def _text_message(message: Any) -> Any:
    """A message whose content is one text, as most templates expect."""
    content = message.get("content") if isinstance(message, dict) else None
    if not isinstance(content, list):
        return message
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) else part
        if not isinstance(text, str):
            raise UserError("own chat templates read text only, and a message holds something else")
        texts.append(text)
    return {**message, "content": "\n".join(texts)}
