"""`proxy-vllm eval`: tasks of the lm-evaluation-harness, with the base, the proxy and others."""

import argparse
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from vllm.entrypoints.cli.types import CLISubcommand

from proxy_vllm.cli.arguments import add_proxy_arguments, json_object
from proxy_vllm.envs import TOXICITY_CLASSIFIER
from proxy_vllm.errors import UserError
from proxy_vllm.methods import METHODS

# Options of the trio that evaluation cannot honour, and why.
_REFUSED = {
    "own_prompts": "the harness makes one prompt for all members",
    "expert_chat_template": "the harness makes one prompt for all members",
    "antiexpert_chat_template": "the harness makes one prompt for all members",
    "enable_lora": "no request of the harness names an adapter",
    "base_url": "the base has to be in the engine: tasks ask for its prompt log-probabilities",
}


class EvalSubcommand(CLISubcommand):
    """The `eval` subcommand."""

    name = "eval"

    @staticmethod
    def cmd(args: argparse.Namespace) -> None:
        from proxy_vllm.eval import check_installed
        from proxy_vllm.eval.report import show, write, write_for_judges

        check_installed()
        if args.classifier is not None:
            os.environ[TOXICITY_CLASSIFIER] = args.classifier
        if args.output is not None and args.output.exists() and not args.output.is_dir():
            raise UserError(f"--output {args.output}: there is a file; name a folder")
        _check_options(args)
        from proxy_vllm.eval.harness import check_tasks

        options = _options(args)
        alphas = None if args.score else _alphas(args)
        tasks = check_tasks(options)
        start = time.monotonic()

        def say(what: str) -> None:
            print(f"[{time.monotonic() - start:4.0f}s] {what} ...", file=sys.stderr, flush=True)

        if args.score:
            report = _score(args.score, tasks, options, say)
        else:
            report = _run(args, alphas or [], options, say)
        show(report)
        if args.output is not None:
            write(report, args.output, _facts(args, time.monotonic() - start))
            write_for_judges(report, args.output, tasks)
            print(f"written to {args.output}", file=sys.stderr)

    def subparser_init(self, subparsers: Any) -> Any:
        from vllm import EngineArgs

        parser = subparsers.add_parser(
            self.name,
            help="Evaluate on tasks of the lm-evaluation-harness.",
            description="Run tasks with the base, the expert alone, the proxy-tuned model and, with"
            " --tuned, a directly tuned model, and print scores and the gap closed. --alphas adds a"
            " sweep; --score marks answers that were made elsewhere, without an engine.",
            usage="proxy-vllm eval BASE --expert E --antiexpert A [--tuned T] --tasks gsm_paper"
            " [--alphas 0 0.5 1] [options]\n"
            "       proxy-vllm eval --score answers.jsonl --tasks gsm_paper [options]",
            epilog="--help=all lists every option, --help=WORD those that match.",
        )
        EngineArgs.add_cli_args(parser)
        parser.add_argument("model_tag", nargs="?", metavar="BASE", help="the large model")
        add_proxy_arguments(parser)
        _add_arguments(parser)
        parser.set_defaults(model=None, seed=None, disable_log_stats=True)
        return parser


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("Eval", "Eval: tasks, rows and what is written")
    group.add_argument(
        "--tasks", nargs="+", required=True, metavar="TASK", help="names, by spaces or commas"
    )
    group.add_argument(
        "--include-path",
        action="append",
        default=[],
        metavar="FOLDER",
        help="task files of your own, repeatable",
    )
    group.add_argument("--tuned", metavar="MODEL", help="the directly tuned model: the ceiling")
    group.add_argument(
        "--tuned-args",
        type=json_object,
        default={},
        metavar="JSON",
        help="vLLM ModelConfig fields of the tuned model alone",
    )
    group.add_argument(
        "--alphas", nargs="+", metavar="ALPHA", help="also run these strengths, and plot them"
    )
    group.add_argument("--skip-expert", action="store_true", help="leave the expert's row out")
    group.add_argument(
        "--score",
        nargs="+",
        metavar="[ROW=]FILE",
        help="mark finished answers (JSONL with text, optionally doc_id and task) instead of making"
        " them; rows named base, proxy and tuned give the gap closed",
    )
    group.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FOLDER",
        help="write report.json, plots, answers, and what judges read",
    )
    group.add_argument("--num-fewshot", type=int, metavar="N", help="examples before each question")
    group.add_argument(
        "--limit", type=float, metavar="N", help="documents of each task, or a share below 1"
    )
    group.add_argument(
        "--apply-chat-template", action="store_true", help="ask through the chat template"
    )
    group.add_argument("--chat-template", metavar="FILE", help="which one; default the expert's")
    group.add_argument(
        "--fewshot-as-multiturn", action="store_true", help="examples as turns of the chat"
    )
    group.add_argument("--system-instruction", metavar="TEXT", help="a system message")
    group.add_argument(
        "--gen-kwargs", metavar="K=V,...", help="generation settings over those of the tasks"
    )
    group.add_argument(
        "--batch-size", default="auto", metavar="N", help="requests handed over at once (auto: all)"
    )
    group.add_argument(
        "--classifier", metavar="MODEL", help="text classifier of toxigen_paper, by folder or name"
    )


def _options(args: argparse.Namespace) -> Any:
    from proxy_vllm.eval.harness import HarnessOptions

    return HarnessOptions(
        tasks=tuple(t for word in args.tasks for t in word.split(",") if t),
        include_path=tuple(args.include_path),
        num_fewshot=args.num_fewshot,
        limit=args.limit,
        apply_chat_template=args.apply_chat_template,
        fewshot_as_multiturn=args.fewshot_as_multiturn,
        system_instruction=args.system_instruction,
        gen_kwargs=args.gen_kwargs,
        batch_size=args.batch_size,
    )


def _check_options(args: argparse.Namespace) -> None:
    """Refuse, before anything is loaded, what no row could honour."""
    from proxy_vllm.eval.plot import check_plots

    if args.limit is not None and not args.limit > 0:
        raise UserError(f"--limit {args.limit:g}: a number above 0")
    if args.num_fewshot is not None and args.num_fewshot < 0:
        raise UserError(f"--num-fewshot {args.num_fewshot}: 0 or more")
    if args.batch_size != "auto" and not (args.batch_size.isdigit() and int(args.batch_size)):
        raise UserError(f"--batch-size {args.batch_size!r}: a number, or auto")
    if args.score:
        for name in ("model_tag", "expert", "antiexpert", "tuned", "alphas", "limit"):
            if getattr(args, name) is not None:
                option = "BASE" if name == "model_tag" else f"--{name}"
                raise UserError(f"--score marks finished answers without an engine: no {option}")
        return
    if METHODS[args.method].base_roles:
        raise UserError(f"--method {args.method}: evaluation compares a base with two small models")
    for name in ("expert", "antiexpert"):
        if not getattr(args, name):
            raise UserError(f"--{name} is needed (--score marks answers without an engine)")
    for name, why in _REFUSED.items():
        if getattr(args, name, None):
            raise UserError(f"--{name.replace('_', '-')}: {why}; leave it out")
    if (args.data_parallel_size or 1) > 1:
        raise UserError("--data-parallel-size: evaluation runs one engine; leave it out")
    if args.alphas is not None:
        check_plots()


def _alphas(args: argparse.Namespace) -> list[float]:
    """The strengths of ``--alphas``, lowest first; empty without it."""
    from proxy_vllm.cli.arguments import proxy_config

    proxy = proxy_config(args)
    args.alpha = proxy.alpha
    words = [w for word in args.alphas or () for w in word.split(",") if w]
    if args.alphas is not None and not words:
        raise UserError("--alphas: name numbers, such as 0 0.5 1 1.5")
    return sorted({proxy.check_alpha(word, "--alphas") for word in words})


def _run(args: argparse.Namespace, alphas: list[float], options: Any, say: Any) -> Any:
    from vllm import EngineArgs

    from proxy_vllm.cli.generate import llm_arguments
    from proxy_vllm.eval.report import Report
    from proxy_vllm.eval.rows import alone, alone_arguments, in_child, trio

    arguments = llm_arguments(args)
    engine = EngineArgs.from_cli_args(args)
    steps = sorted({0.0, args.alpha, *alphas})
    members = [] if args.skip_expert else ["expert"]
    say(f"base and proxy, alpha {', '.join(f'{a:g}' for a in steps)}" + "; expert" * len(members))
    outcomes = in_child(trio, arguments, steps, members, options)
    by_alpha = dict(zip(steps, outcomes))
    rows = {"base": by_alpha[0.0], "proxy": by_alpha[args.alpha]}
    rows |= dict(zip(members, outcomes[len(steps) :]))
    if args.tuned:
        say("directly tuned")
        own = alone_arguments(engine, args.tuned, args.tuned_args)
        rows["tuned"] = in_child(alone, own, options)
    return Report(rows, {alpha: by_alpha[alpha] for alpha in alphas}, args.alpha)


def _score(sources: list[str], tasks: dict[str, Any], options: Any, say: Any) -> Any:
    from proxy_vllm.eval.answers import score
    from proxy_vllm.eval.report import Report

    rows = {}
    for source in sources:
        name, _, file = source.rpartition("=")
        name = name or Path(file).stem
        if name in rows:
            raise UserError(f"--score: two rows are named {name!r}: say ROW=FILE")
        say(f"marking {file}")
        rows[name] = score(file, tasks, options)
    return Report(rows, {}, None)


def _facts(args: argparse.Namespace, seconds: float) -> dict[str, Any]:
    from importlib.metadata import version

    import torch
    import vllm

    import proxy_vllm

    models = {
        "base": args.model_tag,
        **{r: getattr(args, r) for r in ("expert", "antiexpert", "tuned")},
    }
    return {
        "models": {role: name for role, name in models.items() if name},
        "command": shlex.join(["proxy-vllm", *sys.argv[1:]]),
        "seconds": round(seconds, 1),
        "versions": {
            "lm_eval": version("lm_eval"),
            **{m.__name__: m.__version__ for m in (proxy_vllm, vllm, torch)},
        },
    }


def cmd_init() -> list[CLISubcommand]:
    return [EvalSubcommand()]
