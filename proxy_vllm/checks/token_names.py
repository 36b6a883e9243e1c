"""Which of the base's columns are tokens that a tokenizer names; the others are padding."""

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from proxy_vllm.config import ROLES, ProxyConfig

if TYPE_CHECKING:
    from vllm.config import ModelConfig


def with_named_tokens(proxy: ProxyConfig, configs: "dict[str, ModelConfig]") -> ProxyConfig:
    """``proxy`` with the tokens that no member's tokenizer names.

    A token that the expert's tokenizer alone names counts as named: tuning may have put its end
    token into a column that was the base's padding.
    """
    from vllm.tokenizers import cached_tokenizer_from_config

    total = configs["base"].get_vocab_size()
    named: set[int] = set()
    for role in ROLES:
        config = configs[role]
        tokenizer = cached_tokenizer_from_config(config)
        own = _named_by(tokenizer, total)
        own.update(_ids(getattr(config.hf_text_config, "eos_token_id", None)))
        moves = {} if role == "base" else proxy.moved_tokens(role)
        named.update(moves.get(index, index) for index in own)
    end = max((index for index in named if index < total), default=-1) + 1
    if not end:
        return proxy
    holes = tuple(index for index in range(end) if index not in named)
    return replace(proxy, named_tokens=end, unnamed_tokens=holes)


def _named_by(tokenizer: Any, total: int) -> set[int]:
    """Ids below ``total`` that a tokenizer turns into a token, special ones included."""
    named = set(tokenizer.get_vocab().values()) | set(tokenizer.all_special_ids)
    # Some tokenizers, of a model's own code, leave their special tokens out of their vocabulary.
    for index in set(range(total)) - named:
        try:
            if tokenizer.convert_ids_to_tokens([index])[0]:
                named.add(index)
        except Exception:  # what a tokenizer raises for an id that it lacks is its own choice
            continue
    return named


def _ids(value: int | Iterable[int] | None) -> list[int]:
    if value is None:
        return []
    return [value] if isinstance(value, int) else list(value)
