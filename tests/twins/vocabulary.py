"""Small tokenizers of the kinds that real families have, trained on the sentences of the twins."""

import json
from dataclasses import dataclass
from functools import lru_cache

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

# The cl100k-style pattern that Qwen, Llama 3 and OLMo 2 cut words with, shortened.
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class Vocabulary:
    """What a family's tokenizers share: the kind, the tokens, and those that are named one by one.

    Args:
        kind: "byte-level" (GPT-2 and its heirs), "sentencepiece" (Llama 2, Mistral: a space is put
            before every text), or "gemma" (none is).
        first: tokens with the lowest ids; they belong to the model of the tokenizer.
        last: tokens added after all others, as most families add theirs.
        plain: tokens among these that are not special, so that decoding keeps them.
    """

    kind: str
    first: tuple[str, ...] = ()
    last: tuple[str, ...] = ()
    plain: frozenset[str] = frozenset()

    def named(self, more: tuple[str, ...], renamed: dict[str, str]) -> tuple[str, ...]:
        """Every token that is added by name, in the order of ids."""
        return tuple(renamed.get(token, token) for token in (*self.first, *self.last, *more))


def build(
    vocabulary: Vocabulary,
    sentences: tuple[str, ...],
    *,
    bos: str | None,
    more: tuple[str, ...] = (),
    renamed: dict[str, str] | None = None,
    flags: dict[str, bool] | None = None,
) -> Tokenizer:
    """One model's tokenizer.

    Args:
        sentences: what whole-word tokens are learned from.
        bos: the token that starts every text, or None.
        more: tokens that this model has past the family's.
        renamed: the family's tokens that have another name here.
        flags: whether a token is special here, where that differs from the family.
    """
    renamed, flags = renamed or {}, flags or {}
    tokens, merges = _trained(vocabulary.kind, vocabulary.first, sentences)
    tokens = {renamed.get(token, token): i for token, i in tokens.items()}
    if vocabulary.kind == "byte-level":
        tokenizer = Tokenizer(models.BPE(tokens, merges))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_WORDS), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer = Tokenizer(
            models.BPE(tokens, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
        )
        spaces, fuse = normalizers.Replace(" ", "▁"), [decoders.ByteFallback(), decoders.Fuse()]
        prepends = vocabulary.kind == "sentencepiece"
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), spaces] if prepends else [spaces]
        )
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), *fuse, *([decoders.Strip(" ", 1, 0)] if prepends else [])]
        )
    for token in vocabulary.named(more, renamed):
        special = flags.get(token, token not in vocabulary.plain)
        tokenizer.add_tokens([AddedToken(token, special=special, normalized=False)])
    if bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos}:1 $B:1",
            special_tokens=[(bos, tokenizer.token_to_id(bos))],
        )
    return tokenizer


@lru_cache
def _trained(
    kind: str, first: tuple[str, ...], sentences: tuple[str, ...]
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Tokens and merges of a byte-pair encoding in which every word of the sentences is whole."""
    tokenizer = Tokenizer(models.BPE())
    if kind == "byte-level":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_WORDS), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        alphabet, lowest = pre_tokenizers.ByteLevel.alphabet(), list(first)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
            prepend_scheme="always" if kind == "sentencepiece" else "never"
        )
        alphabet, lowest = [], [*first, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=lowest,
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    return model["vocab"], merges
