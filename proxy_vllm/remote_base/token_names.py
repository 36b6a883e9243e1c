"""From an endpoint's names of tokens (text, bytes) to token ids."""

from typing import Any

import numpy as np

from proxy_vllm.remote_base.bounds import BaseRow
from proxy_vllm.remote_base.dialects import Reported

# vLLM writes minus infinity as -9999.
_NO_LOGPROB = -9000.0


class UnknownToken(ValueError):
    """A token that the endpoint names in a way that fits none or several token ids."""


class TokenNames:
    """The ids of a tokenizer's tokens by their bytes and by their text.

    Text stands for one id only where no other token has the same text. Pieces of a character have
    no text of their own: endpoints then write ``bytes:\\xe2\\x80``, or a replacement character that
    fits many ids.

    Args:
        tokenizer: of Transformers, the one whose ids the endpoint uses.
        vocab_size: of the model.
    """

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        from xgrammar import TokenizerInfo

        info = TokenizerInfo.from_huggingface(tokenizer, vocab_size=vocab_size)
        self._by_bytes: dict[bytes, list[int]] = {}
        self._by_text: dict[str, list[int]] = {}
        special = {index: token for token, index in tokenizer.get_added_vocab().items()}
        for index, content in enumerate(info.decoded_vocab):
            if index >= len(tokenizer):
                break
            content = special[index].encode() if index in special else bytes(content)
            self._by_bytes.setdefault(content, []).append(index)
            text = content.decode("utf-8", errors="replace")
            self._by_text.setdefault(text, []).append(index)

    def id_of(self, name: Any) -> int:
        """The one token id with this name.

        Raises:
            UnknownToken: none, or more than one.
        """
        if isinstance(name, int):
            return name
        if isinstance(name, str) and name.startswith("bytes:"):
            name = name.removeprefix("bytes:").encode().decode("unicode_escape").encode("latin-1")
        ids = self._by_bytes.get(name) if isinstance(name, bytes) else self._by_text.get(name)
        if ids is None or len(ids) != 1:
            why = "is none of its tokens" if ids is None else f"may be {len(ids)} of its tokens"
            raise UnknownToken(f"the endpoint's token {name!r} {why} (--base-tokenizer)")
        return ids[0]

    def row(self, reported: Reported, vocab_size: int) -> BaseRow:
        """A row by ids.

        Names that fit no single id are left out, and entries without a log-probability: vLLM's V1
        runner fills a row with them when another request in its batch asked for tokens by id. A
        token that is missing may then be likelier than the least one that is named.

        Raises:
            UnknownToken: the token that the endpoint chose has no single id.
        """
        ids: list[int] = []
        logprobs: list[float] = []
        complete = True
        for name, logprob in reported.top:
            if not logprob > _NO_LOGPROB:
                complete = False
                continue
            try:
                index = self.id_of(name)
            except UnknownToken:
                complete = False
                continue
            if index >= vocab_size or index in ids:
                continue  # a token that the pair lacks stays a part of what is left
            ids.append(index)
            logprobs.append(logprob)
        least = min(logprobs, default=0.0)
        return BaseRow(
            np.array(ids, dtype=np.int64),
            np.array(logprobs, dtype=np.float64),
            least if complete else 0.0,
            self.id_of(reported.token),
        )
