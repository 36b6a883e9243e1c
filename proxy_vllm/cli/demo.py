"""`proxy-vllm demo`: the embedded trio, its parts and its ceiling on held-out problems."""

import argparse
import math
import sys
import time
from pathlib import Path

from vllm.entrypoints.cli.types import CLISubcommand

from proxy_vllm.cli.json_file import check_json_file, write_json_file
from proxy_vllm.errors import UserError


class DemoSubcommand(CLISubcommand):
    """The `demo` subcommand."""

    name = "demo"

    @staticmethod
    def cmd(args: argparse.Namespace) -> None:
        import torch
        import vllm

        import proxy_vllm
        from proxy_vllm.demo.problems import make_problems
        from proxy_vllm.demo.report import show
        from proxy_vllm.demo.run import run_demo

        if not math.isfinite(args.alpha):
            raise UserError(f"--alpha is {args.alpha}: give a finite number")
        if args.json is not None:
            check_json_file(args.json)
        problems = make_problems("test", args.n, args.seed)
        start = time.monotonic()

        def say(label: str) -> None:
            print(f"[{time.monotonic() - start:4.0f}s] {label} ...", file=sys.stderr, flush=True)

        report = run_demo(problems, args.alpha, say)
        show(report)
        if args.json is not None:
            numbers = {
                **report.as_dict(),
                "seed": args.seed,
                "seconds": round(time.monotonic() - start, 1),
                "versions": {m.__name__: m.__version__ for m in (proxy_vllm, vllm, torch)},
            }
            write_json_file(args.json, numbers)

    def subparser_init(self, subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
        parser = subparsers.add_parser(
            self.name,
            help="Run the embedded trio on held-out problems.",
            description=(
                "Run base, expert alone, proxy-tuned and directly tuned through vLLM on held-out "
                "problems, and print accuracies, the gap closed and sample answers."
            ),
        )
        parser.add_argument("--n", type=int, default=400, help="problems (default 400)")
        parser.add_argument("--seed", type=int, default=0, help="draws the problems (default 0)")
        parser.add_argument("--alpha", type=float, default=1.0, help="default 1.0")
        parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there")
        return parser


def cmd_init() -> list[CLISubcommand]:
    return [DemoSubcommand()]
