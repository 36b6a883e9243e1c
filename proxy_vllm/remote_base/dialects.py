"""How endpoints differ: what each takes and what it answers, as data.

An endpoint speaks the OpenAI API with its own habits: how it takes a prompt (token ids or text),
how many log-probabilities it reports, and how it names the tokens of a row. The folder
``tests/remote_base/examples`` holds an answer of each.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from proxy_vllm.errors import UserError

Naming = Literal["token_id", "id", "bytes", "text"]


@dataclass(frozen=True)
class Dialect:
    """One kind of endpoint.

    Attributes:
        route: ``completions`` continues a prompt; ``chat`` answers messages and cannot be given the
            beginning of its answer, so that only the first token can be steered.
        prompt: whether ``completions`` takes token ids, or text alone.
        naming: how tokens of a row are named: ``token_id:7`` in place of text, an ``id`` or
            ``bytes`` beside the text, or the text alone.
        max_top: how many tokens of a row it reports at most; None for all of them.
        body: what every request says beside model, prompt and lengths.
        ask_ids: the field that asks for the log-probabilities of tokens by id, if there is one.
        max_biases: how many tokens ``logit_bias`` takes, by their ids.
        lists: whether one call takes several prompts.
        ends_are_rows: whether the row that ends an answer is reported like any other.
    """

    name: str
    route: Literal["completions", "chat"] = "completions"
    prompt: Literal["ids", "text"] = "ids"
    naming: Naming = "text"
    max_top: int | None = 5
    body: dict[str, Any] = field(default_factory=dict)
    ask_ids: str | None = None
    max_biases: int = 300
    lists: bool = True
    ends_are_rows: bool = False


DIALECTS = {
    d.name: d
    for d in (
        Dialect(
            "vllm",
            naming="token_id",
            max_top=None,
            body={
                "return_tokens_as_token_ids": True,
                "ignore_eos": True,
                "skip_special_tokens": False,
                "add_special_tokens": False,
            },
            ask_ids="logprob_token_ids",
            max_biases=1000,
            ends_are_rows=True,
        ),
        Dialect("openai", prompt="text", naming="text", max_top=5),
        Dialect(
            "openai-chat", route="chat", prompt="text", naming="bytes", max_top=20, lists=False
        ),
        Dialect("together", prompt="text", naming="text", max_top=20, lists=False),
        # llama.cpp's own server; it reports ids, and takes them as a prompt.
        Dialect(
            "llama.cpp",
            naming="id",
            max_top=None,
            body={"ignore_eos": True, "cache_prompt": True},
            ends_are_rows=True,
        ),
        # The server of the Python package llama-cpp-python.
        Dialect("llama-cpp-python", prompt="text", naming="text", max_top=None, lists=False),
    )
}


def get_dialect(name: str) -> Dialect:
    if name not in DIALECTS:
        raise UserError(f"--base-dialect {name} is not known: use auto, {', '.join(DIALECTS)}")
    return DIALECTS[name]


@dataclass
class Reported:
    """One position of an answer, tokens still by the endpoint's names."""

    token: Any
    top: list[tuple[Any, float]]


def request_body(
    dialect: Dialect, model: str, prompt: Any, max_tokens: int, top: int, **more: Any
) -> dict[str, Any]:
    """The body of a request for the base's own greedy continuation and its log-probabilities."""
    body = {"model": model, "max_tokens": max_tokens, "temperature": 0, **dialect.body, **more}
    if dialect.route == "chat":
        message = {"role": "user", "content": prompt}
        return {**body, "messages": [message], "logprobs": True, "top_logprobs": top}
    return {**body, "prompt": prompt, "logprobs": top}


def read_choice(dialect: Dialect, choice: dict[str, Any]) -> list[Reported]:
    """The positions of one choice of an answer, or of one chunk of a stream.

    Raises:
        ValueError: an answer in another form than the dialect's.
    """
    logprobs = choice.get("logprobs")
    if not logprobs:
        return []
    if isinstance(logprobs.get("content"), list):
        return [
            Reported(
                _name(dialect, entry),
                [(_name(dialect, e), float(e["logprob"])) for e in entry["top_logprobs"]],
            )
            for entry in logprobs["content"]
        ]
    rows, tokens = logprobs["top_logprobs"], logprobs["tokens"]
    if rows is None or len(rows) != len(tokens):
        raise ValueError(f"{len(tokens)} tokens with {len(rows or [])} rows of log-probabilities")
    named = []
    for token, row in zip(tokens, rows):
        top = [(_plain(dialect, name), float(logprob)) for name, logprob in (row or {}).items()]
        named.append(Reported(_plain(dialect, token), top))
    return named


def _plain(dialect: Dialect, name: str) -> Any:
    return int(name.removeprefix("token_id:")) if dialect.naming == "token_id" else name


def _name(dialect: Dialect, entry: dict[str, Any]) -> Any:
    if dialect.naming == "id":
        return int(entry["id"])
    if dialect.naming == "bytes" and entry.get("bytes") is not None:
        return bytes(entry["bytes"])
    return _plain(dialect, entry["token"])
