"""Which of the base's columns a tokenizer names."""

from types import SimpleNamespace

import pytest

from proxy_vllm.checks.token_names import with_named_tokens
from proxy_vllm.config import ROLES, ProxyConfig

PROXY = ProxyConfig(expert="e", antiexpert="a")


class Tokenizer:
    """Names some ids in its vocabulary, and some only when asked for one of them."""

    def __init__(self, vocabulary, hidden=(), special=()) -> None:
        self.vocabulary, self.hidden, self.all_special_ids = vocabulary, hidden, list(special)

    def get_vocab(self) -> dict[str, int]:
        return {f"t{i}": i for i in self.vocabulary}

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str | None]:
        if ids[0] in self.hidden:
            return [f"hidden{ids[0]}"]
        if ids[0] % 2:
            raise IndexError(ids[0])
        return [None]


def found(monkeypatch, *tokenizers: Tokenizer, eos=None, total: int = 20) -> ProxyConfig:
    configs = {
        role: SimpleNamespace(
            tokenizer=tokenizer,
            get_vocab_size=lambda: total,
            hf_text_config=SimpleNamespace(eos_token_id=eos),
        )
        for role, tokenizer in zip(ROLES, tokenizers, strict=True)
    }
    monkeypatch.setattr("vllm.tokenizers.cached_tokenizer_from_config", lambda c: c.tokenizer)
    return with_named_tokens(PROXY, configs)


def test_padding_is_what_comes_after_the_last_name(monkeypatch):
    proxy = found(monkeypatch, *[Tokenizer(range(16))] * 3)
    assert (proxy.named_tokens, proxy.unnamed_tokens) == (16, ())
    assert ProxyConfig.from_dict(proxy.to_dict()) == proxy


def test_a_name_of_one_member_is_enough(monkeypatch):
    proxy = found(monkeypatch, Tokenizer(range(12)), Tokenizer([*range(12), 14]), Tokenizer([0]))
    assert (proxy.named_tokens, proxy.unnamed_tokens) == (15, (12, 13))


def test_names_past_the_bases_columns_do_not_count(monkeypatch):
    proxy = found(monkeypatch, *[Tokenizer(range(25))] * 3)
    assert (proxy.named_tokens, proxy.unnamed_tokens) == (20, ())


@pytest.mark.parametrize("eos", [13, [13, 3], None])
def test_special_tokens_outside_of_the_vocabulary(monkeypatch, eos):
    """As in tokenizers of a model's own code: its end of text must stay possible."""
    tokenizer = Tokenizer(range(10), hidden={10, 15}, special=[12])
    proxy = found(monkeypatch, *[tokenizer] * 3, eos=eos)
    assert proxy.named_tokens == 16
    assert proxy.unnamed_tokens == ((11, 14) if eos else (11, 13, 14))
