"""What adapters that are named at start-up lend to what a user meets (``proxy_vllm/surface/``).

A server has one tokenizer and one chat template, and adapters often bring both: those of the tuned
model. They are taken where all adapters that bring a template bring the same.
"""

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proxy_vllm.errors import UserError, one_line

if TYPE_CHECKING:
    from proxy_vllm.surface.member import Member

_TOKENIZER = "tokenizer_config.json"


def lend_surface(expert: "Member", adapters: dict[str, str]) -> list[str]:
    """Give the expert the tokenizer, chat template and end tokens of its adapters, in place.

    Args:
        expert: the small model; one without a tokenizer takes nothing.
        adapters: path by name.

    Returns:
        What is to be said of adapters whose surface is left out.
    """
    from vllm.lora.utils import get_adapter_absolute_path

    if expert.tokenizer is None:
        return []
    warnings: list[str] = []
    templates: dict[str, list[tuple[str, str, Any]]] = {}
    ends: list[int] = []
    for name, path in adapters.items():
        folder = Path(get_adapter_absolute_path(path))
        if not (folder / _TOKENIZER).is_file():
            continue
        own = _tokenizer(expert, name, str(folder))
        if (other := _renamed(expert, own)) is not None:
            warnings.append(
                f"adapter {name!r} brings a tokenizer in which {other}: prompts are read with the"
                " small model's"
            )
            continue
        if own.eos_token_id is not None:
            ends.append(own.eos_token_id)
        if (template := getattr(own, "chat_template", None)) is not None:
            templates.setdefault(str(template), []).append((name, str(folder), own))
    expert.lent_ends = tuple(dict.fromkeys(expert.moves.get(index, index) for index in ends))
    if len(templates) == 1:
        ((_, folder_name, tokenizer),) = next(iter(templates.values()))[:1]
        expert.tokenizer = tokenizer
        expert.config = copy.copy(expert.config)
        expert.config.tokenizer, expert.config.tokenizer_revision = folder_name, None
    elif templates:
        named = ", ".join(repr(found[0][0]) for found in templates.values())
        warnings.append(
            f"adapters {named} bring chat templates that differ, and a server has one: it is the"
            " small model's, or what --chat-template names"
        )
    return warnings


def _tokenizer(expert: "Member", name: str, folder: str) -> Any:
    from vllm.tokenizers import get_tokenizer

    config = expert.config
    try:
        return get_tokenizer(
            folder,
            tokenizer_mode=config.tokenizer_mode,
            trust_remote_code=config.trust_remote_code,
        )
    except Exception as error:
        reason = one_line(error)
        raise UserError(f"adapter {name!r}: its tokenizer cannot be used: {reason}") from None


def _renamed(expert: "Member", tokenizer: Any) -> str | None:
    """A token that the small model's tokenizer has otherwise or not at all; None if all agree."""
    small = {index: token for token, index in expert.tokenizer.get_vocab().items()}
    for token, index in tokenizer.get_vocab().items():
        if small.get(index) != token:
            there = f"{small[index]!r} there" if index in small else "new"
            return f"token {index} is {token!r}, which is {there}"
    return None
