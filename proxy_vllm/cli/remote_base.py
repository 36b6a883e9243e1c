"""Options of a base that lives elsewhere (`--base-url`)."""

import argparse
import dataclasses

from proxy_vllm.errors import UserError
from proxy_vllm.remote_base.settings import RemoteBase


def add_remote_base_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that take the place of BASE."""
    group = parser.add_argument_group(
        "RemoteBase",
        "RemoteBase: a base behind an OpenAI-compatible endpoint that reports log-probabilities;"
        " its key is PROXY_VLLM_BASE_API_KEY in the environment",
    )
    group.add_argument(
        "--base-url", metavar="URL", help="in place of BASE: such as https://host/v1"
    )
    group.add_argument("--base-model", metavar="NAME", help="the base's name at the endpoint")
    group.add_argument(
        "--base-tokenizer",
        metavar="MODEL",
        help="whose tokenizer the base has (default: the expert's)",
    )
    group.add_argument(
        "--base-dialect",
        help="vllm, openai, openai-chat, together, llama.cpp or llama-cpp-python (default: auto)",
    )
    group.add_argument(
        "--base-mode",
        choices=("exact", "top-k"),
        help="exact asks again for tokens that might win; top-k stays with what is reported"
        " (default: exact)",
    )
    group.add_argument(
        "--base-top-logprobs",
        type=int,
        metavar="K",
        help="log-probabilities to ask for; -1 for the whole vocabulary (default: 20)",
    )
    group.add_argument(
        "--base-max-questions",
        type=int,
        metavar="N",
        help="extra questions for one token in exact mode (default: 4)",
    )
    group.add_argument(
        "--base-drafts",
        type=int,
        metavar="N",
        help="tokens that the expert writes ahead and the base scores in one trip (default: 0)",
    )
    group.add_argument(
        "--base-concurrency", type=int, metavar="N", help="trips at once (default: 32)"
    )
    group.add_argument(
        "--base-timeout", type=float, metavar="S", help="seconds without an answer (default: 60)"
    )
    group.add_argument("--base-retries", type=int, metavar="N", help="of a call (default: 4)")
    group.add_argument("--base-max-calls", type=int, metavar="N", help="stop after so many calls")
    group.add_argument(
        "--base-max-cost", type=float, metavar="USD", help="stop after so many dollars, by --price"
    )
    group.add_argument(
        "--price",
        metavar="PROMPT,COMPLETION[,CACHED]",
        help="dollars for a million tokens, to report costs",
    )


def remote_base(args: argparse.Namespace) -> RemoteBase | None:
    """The endpoint that the parsed options describe; None for a base that runs here.

    Raises:
        UserError: options that say nothing without ``--base-url``, or cannot be.
    """
    given = {}
    for field in dataclasses.fields(RemoteBase):
        option = field.name if field.name == "price" else f"base_{field.name}"
        if (value := getattr(args, option, None)) is not None:
            given[field.name] = value
    if "url" not in given:
        if given:
            name = next(iter(given))
            option = "--price" if name == "price" else f"--base-{name.replace('_', '-')}"
            raise UserError(f"{option} is for a base elsewhere: name it by --base-url")
        return None
    if getattr(args, "model_tag", None):
        raise UserError(f"BASE {args.model_tag!r} and --base-url: give one of them")
    return RemoteBase(**{"model": "", **given})
