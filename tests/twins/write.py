"""Write a family's three folders."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoTokenizer

from twins.families import ANSWER, CIRCLE, FAMILIES, SENTENCES, THOUGHT
from twins.family import Family, Surface
from twins.vocabulary import build
from twins.weights import planted_model

# Field names of every configuration here. Heads are of size 32: CPU attention takes no 16.
_SIZES = {
    "large": {
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
    },
    "small": {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "num_key_value_heads": 1,
    },
}
_COMMON = {
    "initializer_range": 0.02,
    "max_position_embeddings": 4096,
    "torch_dtype": "float32",
    "transformers_version": "4.47.0",
}
_MEMBERS = {
    "model": ("large", "base", 1),
    "expert": ("small", "tuned", 2),
    "antiexpert": ("small", "base", 2),
}
_CHAT = [{"role": "user", "content": "What is the capital of France?"}]


def write_twins(
    family: str | Family, root: Path, *, answer: str = ANSWER, tuned: Surface | None = None
) -> dict[str, str]:
    """Write base, expert and antiexpert of a family under ``root``.

    Args:
        family: a name of ``FAMILIES``, or a family of one's own.
        answer: what the expert says in every chat, such as a call of ``TOOL_CALLS``. Each of its
            tokens may occur once. A reasoning family thinks ``THOUGHT`` first.
        tuned: the expert's surface, where it is not the family's.

    Returns:
        Folders, by the argument of ``ProxyLLM``: ``model``, ``expert``, ``antiexpert``.
    """
    family = FAMILIES[family] if isinstance(family, str) else family
    surfaces = {"base": family.base, "tuned": tuned or family.tuned}
    tokenizers = {}
    for role, (_, kind, _) in _MEMBERS.items():
        folder = root / role
        folder.mkdir(parents=True, exist_ok=True)
        tokenizers[role] = _write_tokenizer(folder, family, surfaces[kind])
    starts = _starts(root / "expert")
    tuned_chain = _answer(tokenizers["expert"], starts, family, answer)
    chains = {"base": _circle(tokenizers["model"], family, tuned_chain), "tuned": tuned_chain}
    for role, (size, kind, seed) in _MEMBERS.items():
        tokenizer, surface = tokenizers[role], surfaces[kind]
        columns = tokenizer.get_vocab_size()
        columns += -columns % family.padding[size]
        config = {
            **family.config,
            **_SIZES[size],
            **_COMMON,
            **(family.large if size == "large" else family.small),
            **surface.config,
            "vocab_size": columns,
        }
        _write_json(root / role / "config.json", _with_ids(config, tokenizer))
        if surface.generation is not None:
            generation = {**surface.generation, "transformers_version": "4.47.0"}
            _write_json(root / role / "generation_config.json", _with_ids(generation, tokenizer))
        _write_weights(root / role, chains[kind], seed)
    return {role: str(root / role) for role in _MEMBERS}


def _write_tokenizer(folder: Path, family: Family, surface: Surface) -> Tokenizer:
    tokenizer = build(
        family.vocabulary,
        SENTENCES,
        bos=surface.tokenizer["bos_token"] if family.adds_bos else None,
        more=surface.more,
        renamed=surface.renamed,
        flags=surface.flags,
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    added = {
        str(i): {
            "content": token.content,
            "lstrip": token.lstrip,
            "normalized": token.normalized,
            "rstrip": token.rstrip,
            "single_word": token.single_word,
            "special": token.special,
        }
        for i, token in sorted(tokenizer.get_added_tokens_decoder().items())
    }
    config = {
        "added_tokens_decoder": added,
        "model_max_length": 1000000000000000019884624838656,
        **surface.tokenizer,
    }
    if surface.template is not None:
        config["chat_template"] = surface.template
    _write_json(folder / "tokenizer_config.json", config)
    return tokenizer


def _write_weights(folder: Path, chain: dict[int, int], seed: int) -> None:
    config = AutoConfig.from_pretrained(folder)
    state = planted_model(config, chain, seed).state_dict()
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    save_file(
        {name: tensor.contiguous() for name, tensor in state.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )


def _starts(expert: Path) -> list[int]:
    """The last tokens of the prompts by which the expert's template asks for an answer."""
    tokenizer = AutoTokenizer.from_pretrained(expert)
    ends = []
    for options in ({}, {"enable_thinking": False}):
        text = tokenizer.apply_chat_template(
            _CHAT, tokenize=False, add_generation_prompt=True, **options
        )
        ends.append(tokenizer(text, add_special_tokens=False).input_ids[-1])
    return ends


def _answer(tokenizer: Tokenizer, starts: list[int], family: Family, answer: str) -> dict[int, int]:
    """The answer and the end token, again and again.

    A reasoning family thinks first, unless it is told not to.
    """
    ids = tokenizer.encode(answer, add_special_tokens=False).ids
    end = tokenizer.token_to_id(family.ends[0])
    first = dict.fromkeys([*starts, end], ids[0])
    if family.reasoning_parser is not None:
        thought = f"<think>{THOUGHT}</think>"
        thinking = tokenizer.encode(thought, add_special_tokens=False).ids
        first[starts[0]] = thinking[0]
        first.update(_chain([*thinking, ids[0]]))
    return {**first, **_chain([*ids, end])}


def _circle(tokenizer: Tokenizer, family: Family, tuned: dict[int, int]) -> dict[int, int]:
    """Counting without end, after whatever the tuned model knows what to say to."""
    # A tokenizer that puts a space before every text must not put a second one here.
    text = CIRCLE.strip() if family.vocabulary.kind == "sentencepiece" else CIRCLE
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    known = [token for token in tuned if token < tokenizer.get_vocab_size()]
    return {**dict.fromkeys(known, ids[0]), **_chain([*ids, ids[0]])}


def _chain(ids: list[int]) -> dict[int, int]:
    if len(set(ids[:-1])) < len(ids) - 1:
        raise ValueError(f"a token occurs twice: {ids}")
    return dict(pairwise(ids))


def _with_ids(fields: dict[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """The fields with ids for the names of tokens."""

    def to_id(name: str) -> int:
        index = tokenizer.token_to_id(name)
        assert index is not None, name
        return index

    return {
        key: value
        if not key.endswith("_token_id")
        else [to_id(name) for name in value]
        if isinstance(value, list)
        else to_id(value)
        for key, value in fields.items()
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
