"""One model of the trio, as far as a user meets it: what its files say of tokens and chats."""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from proxy_vllm.checks.tokenizers import names_by_base_id
from proxy_vllm.config import ProxyConfig
from proxy_vllm.errors import UserError, one_line

if TYPE_CHECKING:
    from vllm.config import ModelConfig


@dataclass
class Member:
    """One model of the trio, as far as a user meets it."""

    role: str
    config: "ModelConfig"
    tokenizer: Any  # None on an engine without tokenizers
    moves: dict[int, int]  # the model's id -> the base's, where ``tokenizer_map`` renumbers it
    lent_ends: tuple[int, ...] = ()  # the base's ids of end tokens that its adapters bring

    @cached_property
    def names(self) -> dict[int, str]:
        """Token of each of the base's ids that the tokenizer names."""
        return names_by_base_id(self.tokenizer, self.moves) if self.tokenizer is not None else {}

    @property
    def added(self) -> dict[str, int]:
        """The base's id of each token that was added to the vocabulary, special ones among them."""
        added = self.tokenizer.get_added_vocab()
        return {token: self.moves.get(index, index) for token, index in added.items()}

    @cached_property
    def template(self) -> str | None:
        """Jinja text of the tokenizer's own chat template, if it has one."""
        try:
            return self.tokenizer.get_chat_template()
        except (AttributeError, ValueError):  # Mistral's own tokenizer has none to show
            return None

    @property
    def renders_chats(self) -> bool:
        from vllm.utils.mistral import is_mistral_tokenizer

        return self.template is not None or is_mistral_tokenizer(self.tokenizer)

    @cached_property
    def generation(self) -> dict[str, Any]:
        """What vLLM takes from the model's generation_config.json, or from its configuration."""
        from vllm.transformers_utils.config import try_get_generation_config

        config = self.config
        found = try_get_generation_config(
            config.hf_config_path or config.model,
            trust_remote_code=config.trust_remote_code,
            revision=config.revision,
            code_revision=config.code_revision,
            config_format=config.config_format,
            hf_token=config.hf_token,
        )
        return {} if found is None else found.to_diff_dict()

    @cached_property
    def ends(self) -> list[int]:
        """End tokens of the tokenizer, generation_config.json and config.json, by the base's ids.

        Only what config.json says itself: classes of configurations invent an end token where a
        file names none, and in another vocabulary it is a word.
        """
        from vllm.transformers_utils.repo_utils import get_hf_file_to_dict

        config = self.config
        try:
            written = get_hf_file_to_dict(
                "config.json", config.hf_config_path or config.model, config.revision
            )
        except (OSError, ValueError):
            written = None
        written = written or {}
        nested = written.get("text_config")
        if isinstance(nested, dict):
            written = {**nested, **written}
        ids = [
            *token_ids(getattr(self.tokenizer, "eos_token_id", None)),
            *token_ids(self.generation.get("eos_token_id")),
            *token_ids(written.get("eos_token_id")),
        ]
        own = [self.moves.get(index, index) for index in ids]
        return list(dict.fromkeys([*own, *self.lent_ends]))

    def named(self, index: int) -> str:
        return f"{self.names[index]!r} ({index})" if index in self.names else str(index)


def token_ids(value: Any) -> list[int]:
    """Token ids that a configuration gives as one number or as a list."""
    values = value if isinstance(value, (list, tuple, set)) else [value]
    return [v for v in values if isinstance(v, int) and not isinstance(v, bool)]


def read_members(configs: "dict[str, ModelConfig]", proxy: ProxyConfig) -> dict[str, Member]:
    """Each role's model with its tokenizer; raises ``UserError`` where that cannot be used."""
    from vllm.tokenizers import cached_tokenizer_from_config

    members = {}
    for role, config in configs.items():
        try:
            tokenizer = cached_tokenizer_from_config(config)
        except Exception as error:
            raise UserError(
                f"the {role}'s tokenizer {config.tokenizer!r} cannot be used: {one_line(error)}"
            ) from error
        members[role] = Member(role, config, tokenizer, proxy.moved_tokens(role))
    return members
