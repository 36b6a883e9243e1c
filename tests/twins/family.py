"""How a family of twins is described."""

from dataclasses import dataclass, field
from typing import Any

from twins.vocabulary import Vocabulary


@dataclass(frozen=True)
class Surface:
    """The files beside the weights that differ between a base and its tuned model.

    ``config``, ``generation`` and ``tokenizer`` are fields of config.json, generation_config.json
    and tokenizer_config.json; token ids are given as names.
    """

    config: dict[str, Any] = field(default_factory=dict)
    generation: dict[str, Any] | None = None
    tokenizer: dict[str, Any] = field(default_factory=dict)
    template: str | None = None
    more: tuple[str, ...] = ()  # tokens past the family's
    renamed: dict[str, str] = field(default_factory=dict)
    flags: dict[str, bool] = field(default_factory=dict)  # token -> special, where it differs


@dataclass(frozen=True)
class Family:
    """A base/instruct pair of two sizes, as the hub has them.

    Args:
        names: hub names of base, expert and antiexpert, which README and docs may use.
        config: fields of config.json that base and tuned model share.
        base, tuned: what differs; the antiexpert has the base's surface.
        large, small: fields of config.json by size.
        padding: what the columns of each size are padded to a multiple of.
        ends: end tokens that the tuned model's files name, that of a turn first.
        tool_parser, reasoning_parser: vLLM's parsers for the family, if any.
    """

    names: tuple[str, str, str]
    vocabulary: Vocabulary
    config: dict[str, Any]
    base: Surface
    tuned: Surface
    ends: tuple[str, ...]
    large: dict[str, Any] = field(default_factory=dict)
    small: dict[str, Any] = field(default_factory=dict)
    padding: dict[str, int] = field(default_factory=lambda: {"large": 1, "small": 1})
    adds_bos: bool = False
    tool_parser: str | None = None
    reasoning_parser: str | None = None


# Fields of config.json of every Llama-like model here.
LLAMA_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "mlp_bias": False,
    "model_type": "llama",
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "use_cache": True,
}
