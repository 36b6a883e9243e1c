"""`proxy-vllm explain`: answer prompts, and show on a page what steering did to each token."""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from vllm.entrypoints.cli.types import CLISubcommand

from proxy_vllm.adapters.settings import named_adapters
from proxy_vllm.batch.request import Request, is_openai, parse_request
from proxy_vllm.cli.arguments import add_proxy_arguments, proxy_config
from proxy_vllm.cli.generate import add_line_arguments, line_options, llm_arguments, start_llm
from proxy_vllm.errors import UserError
from proxy_vllm.explain.offline import Explanation, explain, totals
from proxy_vllm.explain.page import LIMIT, page
from proxy_vllm.explain.request import DEFAULT_TOP, MAX_TOP
from proxy_vllm.lifetime import end_with_engines
from proxy_vllm.methods import METHODS

_SHOWN = 8


class ExplainSubcommand(CLISubcommand):
    """The `explain` subcommand."""

    name = "explain"

    @staticmethod
    def cmd(args: argparse.Namespace) -> None:
        from proxy_vllm.batch.jsonl import ResultFile

        if (args.data_parallel_size or 1) > 1:
            raise UserError("--data-parallel-size: explain runs one engine")
        if args.base_url is not None:
            raise UserError(
                "--base-url: of a base elsewhere only a few probabilities are known; explain needs"
                " them all"
            )
        if not 1 <= args.top <= MAX_TOP:
            raise UserError(f"--top is {args.top}: it must lie in 1 .. {MAX_TOP}")
        for target in filter(None, (args.output, args.json)):
            if target == "-":
                raise UserError("-o and --json are files: - is none")
            ResultFile(target, overwrite=args.overwrite)
        requests = _read(args)
        arguments = llm_arguments(args)
        # Without an expert, adapters of the antiexpert are the experts, or the base is one.
        other = args.model if METHODS[args.method].base_roles else "an adapter"
        names = f"{args.model} + alpha ({args.expert or other} - {args.antiexpert or args.model})"
        end_with_engines()
        llm = start_llm(arguments)
        explained = explain(
            llm,
            [r.prompt if r.messages is None else r.messages for r in requests],
            [r.params for r in requests],
            top=args.top,
            use_tqdm=not args.no_progress and sys.stderr.isatty(),
            arguments=[
                {**r.chat, "lora_request": llm.adapters[r.lora] if r.lora is not None else None}
                for r in requests
            ],
            ids=[r.id for r in requests],
        )
        _write(args, explained, names)

    def subparser_init(self, subparsers: Any) -> Any:
        from vllm import EngineArgs

        parser = subparsers.add_parser(
            self.name,
            help="Show what steering did to each token.",
            description="Answer a JSONL file of prompts, as `proxy-vllm generate` does, and write a"
            " page that shows for each token what base, expert and antiexpert each gave it: one"
            " file, which needs no network.",
            usage="proxy-vllm explain BASE --expert E --antiexpert A -i prompts.jsonl"
            " -o report.html [--json out.jsonl] [options]",
            epilog="--help=all lists every option, --help=WORD those that match.",
        )
        EngineArgs.add_cli_args(parser)
        parser.add_argument("model_tag", nargs="?", metavar="BASE", help="the large model")
        add_proxy_arguments(parser)
        group = parser.add_argument_group("Explain", "Explain: files and what they show")
        group.add_argument(
            "-i", "--input", required=True, metavar="FILE", help="JSONL, or - for standard input"
        )
        group.add_argument("-o", "--output", required=True, metavar="FILE", help="the page, HTML")
        group.add_argument("--json", metavar="FILE", help="every value too, an answer a line")
        group.add_argument(
            "--overwrite", action="store_true", help="replace a page and a file that are there"
        )
        group.add_argument(
            "--top",
            type=int,
            default=DEFAULT_TOP,
            metavar="K",
            help="how many of the likeliest tokens to show, of the steered model and of the base"
            f" (default: {DEFAULT_TOP})",
        )
        add_line_arguments(group)
        parser.set_defaults(
            model=None,
            seed=None,
            disable_log_stats=True,
            token_ids=False,
            keep_fields=True,
            tool_call_parser=None,
        )
        return parser


def _read(args: argparse.Namespace) -> list[Request]:
    """The requests of a file, checked before an engine starts."""
    from proxy_vllm.batch.jsonl import open_input, read_jsonl

    adapters = tuple(named_adapters(vars(args))) if args.enable_lora else None
    options, proxy = replace(line_options(args), adapters=adapters), proxy_config(args)
    requests = []
    with open_input(args.input) as stream:
        for number, data in read_jsonl(stream):
            try:
                if isinstance(data, UserError):
                    raise data
                if is_openai(data):
                    raise UserError("a line in OpenAI's batch format: explain reads prompts")
                requests.append(parse_request(number, data, proxy, options))
            except UserError as error:
                raise UserError(f"{args.input}: line {number}: {error}") from None
    if not requests:
        raise UserError(f"{args.input}: no line in it")
    return requests


def _write(args: argparse.Namespace, explained: list[Explanation], names: str) -> None:
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            for explanation in explained:
                file.write(json.dumps(explanation.to_dict(), ensure_ascii=False) + "\n")
    made = page(explained, names, args.top)
    Path(args.output).write_text(made.html, encoding="utf-8")
    found = totals(explained)
    raised = ", ".join(f"{r.token.strip() or r.token!r}" for r in found.raised[:_SHOWN])
    print(
        f"{args.output}: {found.answers} answers, {found.tokens} tokens, steering changed"
        f" {100 * found.share_changed:.1f} %" + (f"; raised most: {raised}" if raised else ""),
        file=sys.stderr,
    )
    size = len(made.html.encode())
    if made.top < args.top or size >= LIMIT:
        print(
            f"{args.output}: {size / 1e6:.1f} MB, with the first {made.top} tokens of each position"
            f" instead of {args.top}; --json has all",
            file=sys.stderr,
        )


def cmd_init() -> list[CLISubcommand]:
    return [ExplainSubcommand()]
