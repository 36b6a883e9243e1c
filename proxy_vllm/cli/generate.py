"""`proxy-vllm generate`: JSONL files of prompts through one engine, or through several on Ray."""

import argparse
import dataclasses
import sys
from typing import Any

from vllm.entrypoints.cli.types import CLISubcommand
from vllm.entrypoints.launchers.cli_args import LoRAParserAction

from proxy_vllm.adapters.settings import named_adapters
from proxy_vllm.batch.request import LineOptions
from proxy_vllm.cli.arguments import add_proxy_arguments, json_object, name_base, proxy_config
from proxy_vllm.errors import UserError
from proxy_vllm.lifetime import end_with_engines

_SAMPLING = {
    "temperature": (float, "0 is greedy (default: the model's own, else 1)"),
    "max_tokens": (int, "of each text (default: 256)"),
    "top_p": (float, "share of probability to sample from"),
    "top_k": (int, "number of tokens to sample from"),
}
_MAX_TOKENS = 256


class GenerateSubcommand(CLISubcommand):
    """The `generate` subcommand."""

    name = "generate"

    @staticmethod
    def cmd(args: argparse.Namespace) -> None:
        if (args.data_parallel_size or 1) > 1:
            raise UserError("--data-parallel-size: --replicas N runs N engines on Ray")
        lines = line_options(args)
        llm = llm_arguments(args)
        end_with_engines()
        if args.replicas is not None or args.ray_address is not None:
            code = ray_job(args, llm, lines).run()
        else:
            code = file_job(args, llm, lines).run(lambda: start_llm(llm))
        if code:
            sys.exit(code)

    def subparser_init(self, subparsers: Any) -> Any:
        from vllm import EngineArgs

        parser = subparsers.add_parser(
            self.name,
            help="Answer files of prompts.",
            description="Answer a JSONL file, one object a line: prompt (text or token ids, or"
            " with --own-prompts an object of them for base, expert and antiexpert) or messages;"
            " optionally id, proxy_alpha, any field of vllm.SamplingParams, and for messages"
            " chat_template_kwargs, tools and the like. Lines in OpenAI's batch format are answered"
            " in that format.\n"
            "Answers come as JSONL in the order of the lines. --seed also seeds the lines that"
            " name no seed.",
            usage="proxy-vllm generate BASE --expert E --antiexpert A -i prompts.jsonl"
            " -o out.jsonl [options]",
            epilog="--help=all lists every option, --help=WORD those that match.",
        )
        EngineArgs.add_cli_args(parser)
        parser.add_argument("model_tag", nargs="?", metavar="BASE", help="the large model")
        add_proxy_arguments(parser)
        _add_batch_arguments(parser)
        # An explicit --seed is told from vLLM's default; its statistics are for servers.
        parser.set_defaults(model=None, seed=None, disable_log_stats=True)
        return parser


def _add_batch_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("Batch", "Batch: files, sampling and replicas")
    group.add_argument(
        "-i",
        "--input",
        action="append",
        required=True,
        metavar="FILE",
        help="JSONL, or - for standard input; with --replicas also Parquet and folders, repeatable",
    )
    group.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="FILE",
        help="JSONL, or - for standard output; with --replicas a folder",
    )
    existing = group.add_mutually_exclusive_group()
    existing.add_argument(
        "--resume", action="store_true", help="keep the answers that are there, add the others"
    )
    existing.add_argument(
        "--overwrite", action="store_true", help="replace the answers that are there"
    )
    group.add_argument(
        "--on-error",
        choices=("fail", "skip"),
        default="fail",
        help="a line that cannot be answered ends the run with status 2 once the lines before it"
        " are written (fail, the default), or goes to OUTPUT.errors.jsonl, and the run ends with"
        " status 1 (skip)",
    )
    add_line_arguments(group)
    group.add_argument(
        "--keep-fields",
        action="store_true",
        help="copy fields of a line that are none of a request's to its answer, and do not refuse"
        " them",
    )
    group.add_argument(
        "--tool-call-parser",
        metavar="NAME",
        help="vLLM's parser of tool calls, for lines in OpenAI's batch format",
    )
    group.add_argument("--token-ids", action="store_true", help="add token_ids to the answers")
    group.add_argument(
        "--replicas",
        type=int,
        metavar="N",
        help="run N engines on Ray, each with --tensor-parallel-size GPUs",
    )
    group.add_argument(
        "--ray-address",
        metavar="ADDR",
        help="Ray cluster to use, such as auto or ray://host:10001; a local one if not given",
    )
    group.add_argument(
        "--block-rows",
        type=int,
        default=256,
        metavar="N",
        help="with --replicas: lines of one block, the unit of work and of one output file",
    )


def add_line_arguments(group: Any) -> None:
    """Options of every command that reads lines: what they leave out, chats, progress."""
    for name, (kind, text) in _SAMPLING.items():
        group.add_argument(
            f"--{name.replace('_', '-')}",
            type=kind,
            help=f"of lines that name none: {text}",
        )
    group.add_argument(
        "--line-defaults",
        type=json_object,
        default={},
        metavar="JSON",
        help="fields of lines that name none, such as"
        """ '{"chat_template_kwargs": {"enable_thinking": false}}'""",
    )
    group.add_argument("--chat-template", metavar="FILE", help="for messages; default the expert's")
    group.add_argument(
        "--lora-modules",
        action=LoRAParserAction,
        nargs="+",
        metavar="NAME=PATH",
        help="LoRA adapters that lines may name in lora (with --enable-lora)",
    )
    group.add_argument("--no-progress", action="store_true", help="show no progress bar")


def line_options(args: argparse.Namespace) -> LineOptions:
    """How lines are read and answered, checked."""
    from proxy_vllm.batch.request import (
        CHAT_FIELDS,
        check_chat_field,
        check_field,
        sampling_fields,
        sampling_params,
    )

    chat = {name: args.line_defaults[name] for name in CHAT_FIELDS if name in args.line_defaults}
    for name, value in chat.items():
        check_chat_field(name, value)
    sampling = {name: value for name, value in args.line_defaults.items() if name not in chat}
    for name in sampling:
        if name not in sampling_fields():
            raise UserError(f"--line-defaults: {name} is no field that lines can do without")
    named = {name: getattr(args, name) for name in (*_SAMPLING, "seed")}
    sampling |= {name: value for name, value in named.items() if value is not None}
    sampling = {"max_tokens": _MAX_TOKENS, **sampling}
    sampling = {name: check_field(name, value) for name, value in sampling.items()}
    sampling_params(sampling)
    served = args.served_model_name or args.model_tag or args.model
    return LineOptions(
        {**sampling, **chat},
        args.token_ids,
        args.keep_fields,
        args.tool_call_parser,
        adapters=tuple(named_adapters(vars(args))) if args.enable_lora else None,
        served=tuple(served) if isinstance(served, list) else (served,),
    )


def llm_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of ``ProxyLLM`` that the command line describes."""
    from vllm import EngineArgs

    if args.seed is None:
        args.seed = 0
    proxy = proxy_config(args)
    name_base(args, proxy)
    engine = EngineArgs.from_cli_args(args)
    own = {field.name: getattr(proxy, field.name) for field in dataclasses.fields(proxy)}
    # What is found out at the start, and what a server's /metrics alone shows.
    for other in ("named_tokens", "unnamed_tokens", "same_weights", "changed_tokens_every"):
        del own[other]
    if own.pop("adapters"):
        own |= {"expert": None, "expert_args": {}}
    if (remote := own.pop("remote_base")) is not None:
        more = dataclasses.asdict(remote)
        own["base_url"], own["base_model"] = more.pop("url"), more.pop("model")
        own |= {"model": None, "base_args": more}
    return {
        **{field.name: getattr(engine, field.name) for field in dataclasses.fields(engine)},
        **own,
        "lora_modules": named_adapters(vars(args)),
        "chat_template": args.chat_template,
        "base_chat_template": args.base_chat_template,
    }


def file_job(args: argparse.Namespace, llm: dict[str, Any], lines: LineOptions) -> Any:
    """The ``FileJob`` that the command line describes."""
    from proxy_vllm.batch.file_job import FileJob
    from proxy_vllm.batch.settings import settings_of

    if len(args.input) > 1:
        raise UserError("--input: one file at a time; --replicas reads several, on Ray")
    return FileJob(
        source=args.input[0],
        target=args.output,
        lines=lines,
        proxy=proxy_config(args),
        settings=settings_of(llm, **dataclasses.asdict(lines)),
        resume=args.resume,
        overwrite=args.overwrite,
        skip_errors=args.on_error == "skip",
        show_progress=not args.no_progress,
    )


def ray_job(args: argparse.Namespace, llm: dict[str, Any], lines: LineOptions) -> Any:
    """The ``RayJob`` that the command line describes."""
    try:
        from proxy_vllm.batch.ray_job import RayJob
    except ImportError as error:
        raise UserError(f"--replicas needs Ray ({error}): pip install '.[ray]'") from None

    if "-" in (*args.input, args.output):
        raise UserError("--replicas reads files and folders and writes a folder: - is none")
    if llm.get("base_url"):
        raise UserError("--replicas: one engine is enough for a base elsewhere (--base-url)")
    return RayJob(
        sources=args.input,
        target=args.output,
        llm_arguments=llm,
        lines=lines,
        replicas=1 if args.replicas is None else args.replicas,
        address=args.ray_address,
        block_rows=args.block_rows,
        resume=args.resume,
        overwrite=args.overwrite,
        skip_errors=args.on_error == "skip",
        show_progress=not args.no_progress,
    )


def start_llm(llm: dict[str, Any]) -> Any:
    from proxy_vllm import ProxyLLM

    return ProxyLLM(**llm)


def cmd_init() -> list[CLISubcommand]:
    return [GenerateSubcommand()]
