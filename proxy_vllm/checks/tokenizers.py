"""Whether three tokenizers give each token id one meaning: the formula adds logits id by id.

What real base and tuned models differ in, and what follows:

- *Tokens that one has and the other lacks* (added by tuning, a pad token, unnamed padding) are no
  fault. Past the base's vocabulary they are never generated.
- *Special flags and padding of the matrix* say nothing about ids.
- *Placeholders* (``<|reserved_special_token_5|>``, ``<unused5>``, ``[control_5]``) stand for
  nothing: no text holds them and no model has learned them. Where one tokenizer has a placeholder
  and the other a name, as where tuning gave a reserved token a use, the name counts.
- *Any other id with two names* would add the logits of different words. It is refused, unless
  ``tokenizer_map`` says that the two are one.
"""

import re
from collections.abc import Container
from functools import partial
from typing import TYPE_CHECKING, Any

from proxy_vllm.checks.folders import reading
from proxy_vllm.config import ROLES, ProxyConfig
from proxy_vllm.errors import UserError

if TYPE_CHECKING:
    from vllm.config import ModelConfig

# Names of tokens that are kept for later: in brackets, with one of these words and a number.
_PLACEHOLDER = re.compile(
    r"[<\[]\W*[\w▁]*"
    r"(?:reserved|unused|extra|control|dummy|filler|place[▁_]?holder|special)[\w▁]*?\d+\W*[>\]]",
    re.IGNORECASE,
)
_SHOWN = 3


def is_placeholder(token: str) -> bool:
    """Whether a token is one that tokenizers keep for later use."""
    return _PLACEHOLDER.fullmatch(token) is not None


def disagreements(base: dict[int, str], own: dict[int, str], mapped: Container[int]) -> list[int]:
    """The base's ids by which a small member means another token.

    Args:
        base: token of each id that the base's tokenizer names.
        own: the same of the small member's, by the base's ids.
        mapped: the base's ids for which ``tokenizer_map`` says that the two are one.
    """
    return sorted(
        index
        for index in base.keys() & own.keys()
        if index not in mapped
        and base[index] != own[index]
        and not is_placeholder(base[index])
        and not is_placeholder(own[index])
    )


def check_tokenizers(configs: "dict[str, ModelConfig]", proxy: ProxyConfig) -> None:
    """Refuse members whose tokenizers give one id to two tokens.

    Raises:
        UserError: naming the tokens and the way out.
    """
    from vllm.tokenizers import cached_tokenizer_from_config

    tokenizers: dict[str, Any] = {
        role: reading(
            f"tokenizer of the {role}",
            config.tokenizer,
            partial(cached_tokenizer_from_config, config),
        )
        for role, config in configs.items()
    }
    for role in ROLES[1:]:
        _check_map(configs, proxy, role)
        _compare(role, tokenizers["base"], tokenizers[role], proxy)


def names_by_base_id(tokenizer: Any, moves: dict[int, int]) -> dict[int, str]:
    """Token of each id that a tokenizer names, by the base's ids."""
    return {moves.get(index, index): token for token, index in tokenizer.get_vocab().items()}


def _compare(role: str, base: Any, own: Any, proxy: ProxyConfig) -> None:
    from vllm.logger import init_logger
    from vllm.utils.mistral import is_mistral_tokenizer

    moves = proxy.moved_tokens(role)
    known, meant = names_by_base_id(base, {}), names_by_base_id(own, moves)
    shared = known.keys() & meant.keys()
    if not shared:
        raise UserError(f"the tokenizers of base and {role} share no token id")
    mapped = proxy.tokenizer_map.get(role, {}).values()
    if differing := disagreements(known, meant, set(mapped)):
        shown = "; ".join(f"{i}: {known[i]!r} / {meant[i]!r}" for i in differing[:_SHOWN])
        added = set(base.get_added_vocab().values()) & {
            moves.get(i, i) for i in own.get_added_vocab().values()
        }
        way_out = "use members of one family"
        if is_mistral_tokenizer(base) != is_mistral_tokenizer(own):
            way_out = "one is Mistral's own tokenizer: --tokenizer-mode hf reads all alike"
        elif added.issuperset(differing):
            way_out = "if they mean the same, say so with --tokenizer-map"
        raise UserError(
            f"the tokenizers of base and {role} disagree on {len(differing)} token ids, first"
            f" {shown}: {way_out}, or --allow-tokenizer-mismatch"
        )
    given = [
        f"{meant[i]!r} ({i})"
        for i in sorted(shared)
        if known[i] != meant[i] and is_placeholder(known[i]) and not is_placeholder(meant[i])
    ]
    if given:
        init_logger(f"vllm.{__name__}").info(
            "the %s has given a use to tokens that are reserved in the base: %s",
            role,
            ", ".join(given[:8]) + (", ..." if len(given) > 8 else ""),
        )


def _check_map(configs: "dict[str, ModelConfig]", proxy: ProxyConfig, role: str) -> None:
    """Refuse ids of a tokenizer map that a model does not have."""
    columns = {name: configs[name].get_vocab_size() for name in ("base", role)}
    for own, base in proxy.tokenizer_map.get(role, {}).items():
        # A base's token needs a row of the member's matrices to be put in.
        for index, whose in ((own, role), (base, "base"), (base, role)):
            if index >= columns[whose]:
                raise UserError(
                    f"--tokenizer-map: {role} {own} -> {base}: the {whose}'s vocabulary ends at"
                    f" {columns[whose] - 1}"
                )
