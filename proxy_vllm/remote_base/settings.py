"""Settings of a base that lives elsewhere; they travel inside ``ProxyConfig``."""

from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from proxy_vllm.errors import UserError
from proxy_vllm.remote_base.usage import Price


@dataclass(frozen=True)
class RemoteBase:
    """An OpenAI-compatible endpoint that serves the base.

    The API key is no setting: it comes from the environment (``proxy_vllm.envs``).

    Args:
        url: such as ``https://host/v1``.
        model: the base's name there.
        tokenizer: folder or hub name of the base's own tokenizer; None for the expert's.
        dialect: a name of ``dialects.py``, or ``auto``.
        mode: ``exact`` asks again for tokens that might win; ``top-k`` stays with what is reported.
        top_logprobs: how many log-probabilities to ask for; -1 for the whole vocabulary, where the
            endpoint gives it.
        max_questions: extra questions for one token in ``exact`` mode.
        drafts: tokens that the expert writes ahead and the base scores in the same trip; fewer
            trips, more prompt tokens. 0 is off.
        compares: the endpoint reports a row as it is though ``logit_bias`` is given, so that one
            call is a row and a question. Found out at the start.
        concurrency: trips at once: a stream, and the questions about its tokens.
        timeout: seconds without an answer after which a call is tried again.
        retries: of a call that failed; ``Retry-After`` is heeded.
        max_calls, max_cost: limits of this process; the cost in dollars, by ``price``.
        price: ``PROMPT,COMPLETION[,CACHED]`` in dollars for a million tokens.
    """

    url: str
    model: str
    tokenizer: str | None = None
    dialect: str = "auto"
    mode: Literal["exact", "top-k"] = "exact"
    top_logprobs: int = 20
    max_questions: int = 4
    drafts: int = 0
    compares: bool = False
    concurrency: int = 32
    timeout: float = 60.0
    retries: int = 4
    max_calls: int | None = None
    max_cost: float | None = None
    price: str | None = None

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"--base-url {self.url}: a URL is needed, such as https://host/v1")
        if parts.username or parts.password:
            raise UserError("--base-url: no key in the URL; set PROXY_VLLM_BASE_API_KEY")
        if not self.model:
            raise UserError("--base-url needs --base-model, the base's name at the endpoint")
        if self.mode not in ("exact", "top-k"):
            raise UserError(f"--base-mode {self.mode}: exact or top-k")
        if self.top_logprobs < 1 and self.top_logprobs != -1:
            raise UserError(f"--base-top-logprobs {self.top_logprobs}: at least 1, or -1 for all")
        for name in ("concurrency", "timeout"):
            if getattr(self, name) <= 0:
                raise UserError(f"--base-{name} {getattr(self, name)}: it must be above 0")
        for name in ("retries", "max_questions", "drafts"):
            if getattr(self, name) < 0:
                raise UserError(f"--base-{name.replace('_', '-')}: it must not be negative")
        if self.max_cost is not None and self.price is None:
            raise UserError("--base-max-cost needs --price")
        if self.price is not None:
            Price.parse(self.price)
