"""`proxy-vllm serve`: `vllm serve` for a proxy-tuned model."""

import argparse
import errno
from pathlib import Path

import uvloop
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.entrypoints.cli.types import CLISubcommand
from vllm.utils.argparse_utils import FlexibleArgumentParser

from proxy_vllm.cli.arguments import add_proxy_arguments, apply_to_namespace
from proxy_vllm.errors import UserError, one_line
from proxy_vllm.lifetime import end_with_engines
from proxy_vllm.server import add_middleware

# How long requests may go on after SIGTERM (--shutdown-timeout).
DRAIN_SECONDS = 60


class ProxyServeSubcommand(ServeSubcommand):
    """Every mode of `vllm serve` (one server, several, data parallel, headless), with the trio."""

    @staticmethod
    def cmd(args: argparse.Namespace) -> None:
        _check_tls_files(args)
        apply_to_namespace(args, steers_remote_base=True)
        end_with_engines(serves=True)
        # Requests with an alpha that cannot run are answered 400 before they reach the engine.
        add_middleware(args)
        try:
            if args.base_url is None:
                ServeSubcommand.cmd(args)
            else:
                from proxy_vllm.remote_base.async_llm import run_server

                uvloop.run(run_server(args))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            raise UserError(f"--port {args.port} is in use: name another") from error

    def validate(self, args: argparse.Namespace) -> None:
        try:
            super().validate(args)
        except TypeError as error:  # options that need another one
            raise UserError(one_line(error).removeprefix("Error: ")) from error

    def subparser_init(self, subparsers: argparse._SubParsersAction) -> FlexibleArgumentParser:
        parser = super().subparser_init(subparsers)
        parser.usage = "proxy-vllm serve BASE --expert E --antiexpert A [options of vllm serve]"
        # After its first paragraph, which names a model of its own choice, how to search the help.
        _, _, search = (parser.description or "").partition("\n\n")
        parser.description = (
            f"Serve a proxy-tuned model over HTTP, with the routes of OpenAI's API.\n\n{search}"
        )
        add_proxy_arguments(parser)
        parser.add_argument(
            "--playground",
            action="store_true",
            help="a page at /playground to try prompts and alphas on, beside the base",
        )
        parser.add_argument(
            "--changed-tokens-every",
            type=int,
            default=0,
            metavar="STEPS",
            help="for /metrics: in one step of so many, look whether the base alone would choose"
            " another token, for at most 16 requests (default: 0, never)",
        )
        # vLLM's default, 0, cuts off what is running on SIGTERM.
        parser.set_defaults(shutdown_timeout=DRAIN_SECONDS)
        return parser


def _check_tls_files(args: argparse.Namespace) -> None:
    """vLLM reads them once all weights are loaded, and then says nothing but where it failed."""
    for name in ("ssl_keyfile", "ssl_certfile", "ssl_ca_certs"):
        file = getattr(args, name)
        if file is not None and not Path(file).is_file():
            raise UserError(f"--{name.replace('_', '-')} {file}: no such file")
    if args.ssl_keyfile is not None and args.ssl_certfile is None:
        raise UserError("--ssl-keyfile needs --ssl-certfile")


def cmd_init() -> list[CLISubcommand]:
    return [ProxyServeSubcommand()]
