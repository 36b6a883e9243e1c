"""`proxy-vllm plan`: fit, KV cache and speed of a trio on a GPU, from three config.json files.

Imports no vLLM, so that it runs where vLLM is not installed; the subcommand therefore only has the
shape of `vllm.entrypoints.cli.types.CLISubcommand`.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proxy_vllm.cli.json_file import write_json_file
from proxy_vllm.errors import UserError
from proxy_vllm.methods import METHODS, method_fields

if TYPE_CHECKING:
    from rich.console import Console

    from proxy_vllm.plan.adapters import AdapterSlots
    from proxy_vllm.plan.remote_base import RemoteBasePlan
    from proxy_vllm.plan.roofline import Plan

# Options that say something of a base elsewhere alone: fields of `plan.remote_base.Trips`.
_TRIPS = {
    "latency_ms": "--base-latency-ms",
    "tokens_a_trip": "--tokens-a-trip",
    "questions_a_token": "--questions-a-token",
}


class PlanSubcommand:
    """The `plan` subcommand."""

    name = "plan"
    help = "Tell before any download whether a trio fits a GPU, and how fast it can be."

    @staticmethod
    def cmd(args: argparse.Namespace) -> None:
        from proxy_vllm.cli.remote_base import remote_base
        from proxy_vllm.plan.gpus import find_gpu
        from proxy_vllm.plan.model_size import model_shape
        from proxy_vllm.plan.roofline import plan

        remote = remote_base(args)
        _check_base(args, remote is not None)
        gpu = find_gpu(
            args.gpu,
            bandwidth_tbps=args.bandwidth_tbps,
            tflops=args.tflops,
            memory_gib=args.memory_gib,
        )
        load: dict[str, Any] = {
            "dtype": args.dtype,
            "kv_cache_dtype": args.kv_cache_dtype,
            "batch": args.batch,
            "context": args.context,
            "tp": args.tensor_parallel_size,
            "gpu_memory_utilization": args.gpu_memory_utilization,
            "reserve_gib": args.reserve_gib,
        }
        adapters = not args.expert and args.enable_lora
        named = method_fields(args.method, args.expert, args.antiexpert, adapters=adapters)
        if adapters:
            named["expert"] = named["antiexpert"]
        if remote is not None and METHODS[args.method].base_roles:
            raise UserError(f"--method {args.method} needs a base in the engine: name its folder")
        small = {role: named[role] or args.model for role in ("expert", "antiexpert")}
        expert, antiexpert = map(model_shape, small.values())
        result: Plan | RemoteBasePlan
        if remote is not None:
            from proxy_vllm.plan.remote_base import Trips, plan_remote_base

            given = {n: v for n in _TRIPS if (v := getattr(args, n)) is not None}
            result = plan_remote_base(remote, expert, antiexpert, gpu, trips=Trips(**given), **load)
        else:
            result = plan(
                model_shape(args.model),
                expert,
                antiexpert,
                gpu,
                speculative_tokens=args.speculative_tokens,
                acceptance=args.acceptance,
                same_as_base=[role for role, name in small.items() if _same(name, args.model)],
                adapters=_adapters(args),
                another_prompt=("antiexpert",) if METHODS[args.method].guided else (),
                **load,
            )
        if args.json == "-":
            print(json.dumps(result.to_dict(), indent=2))
            return
        if args.json:
            write_json_file(Path(args.json), result.to_dict())
        print_plan(result)

    def validate(self, args: argparse.Namespace) -> None:
        pass

    def subparser_init(self, subparsers: Any) -> Any:
        from proxy_vllm.cli.remote_base import add_remote_base_arguments
        from proxy_vllm.plan.gpus import GPUS
        from proxy_vllm.plan.remote_base import QUESTIONS_A_TOKEN, TOKENS_A_TRIP
        from proxy_vllm.plan.roofline import RESERVE_GIB

        parser = subparsers.add_parser(
            self.name,
            help=self.help,
            description=f"{self.help} Only config.json of each model is read.",
            usage="proxy-vllm plan BASE --expert E --antiexpert A --gpu GPU [options]",
        )
        parser.add_argument("model", metavar="BASE", nargs="?", help="model folder, or hub name")
        parser.add_argument(
            "--expert", help="the small tuned model; with --enable-lora it may be left out"
        )
        parser.add_argument("--antiexpert", help="the small untuned model")
        parser.add_argument(
            "--method", default="proxy", choices=METHODS, help="the formula (default: proxy)"
        )
        parser.add_argument("--gpu", help=f"one of {', '.join(GPUS)}")
        parser.add_argument("--bandwidth-tbps", type=float, help="memory bandwidth, 1e12 bytes/s")
        parser.add_argument("--tflops", type=float, help="dense 16-bit matmul rate, 1e12 FLOP/s")
        parser.add_argument("--memory-gib", type=float, help="memory of one GPU")
        parser.add_argument(
            "--tp",
            "--tensor-parallel-size",
            "-tp",
            dest="tensor_parallel_size",
            type=int,
            default=1,
        )
        parser.add_argument("--batch", type=int, default=1, help="sequences decoded together")
        parser.add_argument("--context", type=int, default=1024, help="tokens of each sequence")
        parser.add_argument("--dtype", default="bfloat16", help="of the weights (default bfloat16)")
        parser.add_argument("--kv-cache-dtype", default="auto", help="auto is --dtype; or fp8")
        parser.add_argument("--gpu-memory-utilization", type=float, default=0.9)
        parser.add_argument(
            "--reserve-gib",
            type=float,
            default=RESERVE_GIB,
            help="kept on each GPU for CUDA context, activations, logits and CUDA graphs "
            "(default %(default)s)",
        )
        parser.add_argument(
            "--speculative-tokens",
            type=int,
            metavar="K",
            help="also the speed with K drafts of the expert a round; needs --acceptance",
        )
        parser.add_argument(
            "--acceptance",
            type=float,
            metavar="A",
            help="probability from 0 to 1 that a draft is accepted",
        )
        parser.add_argument(
            "--enable-lora", action="store_true", help="requests name LoRA adapters of the expert"
        )
        parser.add_argument("--max-loras", type=int, default=1, help="adapters in one step")
        parser.add_argument("--max-lora-rank", type=int, default=16, help="of an adapter")
        add_remote_base_arguments(parser)
        parser.add_argument(
            "--base-latency-ms",
            dest="latency_ms",
            type=float,
            metavar="MS",
            help="of a round trip to --base-url (default: 0)",
        )
        parser.add_argument(
            "--tokens-a-trip",
            type=float,
            metavar="T",
            help=f"of an answer, from --base-url (default: {TOKENS_A_TRIP}, the trio's in the box)",
        )
        parser.add_argument(
            "--questions-a-token",
            type=float,
            metavar="Q",
            help=f"further calls to --base-url (default: {QUESTIONS_A_TOKEN}, the same trio's)",
        )
        parser.add_argument("--json", metavar="FILE", help="write the figures; - for stdout only")
        return parser


def _same(name: str, base: str) -> bool:
    """Whether two names are one model's, so that an engine loads and runs it once."""
    names = [os.path.realpath(n) if os.path.exists(n) else n for n in (name, base)]
    return names[0] == names[1]


def _check_base(args: argparse.Namespace, elsewhere: bool) -> None:

    named = "expert" in METHODS[args.method].named_roles
    if named and not args.expert and (elsewhere or not args.enable_lora):
        raise UserError("--expert is missing: the small tuned model, or --enable-lora")
    if elsewhere:
        if args.enable_lora:
            raise UserError("--enable-lora is for a base in the engine: leave --base-url out")
        if args.model is not None:
            raise UserError(f"BASE {args.model!r} and --base-url: give one of them")
        if args.speculative_tokens is not None:
            raise UserError("--speculative-tokens is for a base in the engine: --base-drafts")
        return
    if args.model is None:
        raise UserError("BASE is missing: a model folder or hub name, or --base-url")
    for name, option in _TRIPS.items():
        if getattr(args, name) is not None:
            raise UserError(f"{option} is for a base elsewhere: name it by --base-url")


def _adapters(args: argparse.Namespace) -> AdapterSlots | None:
    from proxy_vllm.plan.adapters import AdapterSlots

    if not args.enable_lora:
        return None
    return AdapterSlots(args.max_loras, args.max_lora_rank, alone=not args.expert)


def print_plan(result: Plan | RemoteBasePlan) -> None:
    """A short table for people on stdout."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from proxy_vllm.plan.roofline import Plan

    inputs, gpu = result.inputs, result.inputs["gpu"]
    tp, batch, context = (inputs[k] for k in ("tensor_parallel_size", "batch", "context"))
    count = f"{tp} x " if tp > 1 else ""
    console = Console(soft_wrap=True, highlight=False)
    console.print(
        f"{count}{escape(gpu['name'])}: {gpu['bandwidth_tbps']:g} TB/s, {gpu['tflops']:g} TFLOP/s, "
        f"{gpu['memory_gib']:g} GiB ({gpu['source']}); {inputs['dtype']}, batch {batch}, "
        f"context {context}"
    )
    weights = Table("weights", "model", "GiB")
    weights.columns[2].justify = "right"
    for role in ("base", "expert", "antiexpert"):
        if role in result.weights_gib:
            same = role in inputs.get("same_as_base", ())
            size = "the base's" if same else _gib(result.weights_gib[role])
            weights.add_row(role, escape(inputs[role]), size)
    if (adapters := inputs.get("adapters")) is not None:
        slots = f"{adapters['count']} of rank {adapters['rank']}"
        weights.add_row("adapters", slots, _gib(result.weights_gib["adapters"]))
    weights.add_row("total", "", _gib(result.weights_gib["total"]))
    console.print(weights)
    if isinstance(result, Plan):
        _print_speed(console, result)
    else:
        _print_trips(console, result)
    for note in result.notes:
        console.print(f"note: {escape(note)}")


def _print_speed(console: Console, result: Plan) -> None:
    """Beside the base alone."""
    from rich.table import Table

    speed = Table("", "proxy-tuned", "base alone")
    for column in speed.columns[1:]:
        column.justify = "right"
    speed.add_row(
        "decode step, at least", f"{result.step_ms:.3g} ms", f"{result.base_step_ms:.3g} ms"
    )
    speed.add_row(
        "tokens/s, at most", f"{result.tokens_per_s:,.0f}", f"{result.base_tokens_per_s:,.0f}"
    )
    speed.add_row("slowdown against base", f"{result.slowdown:.2f}x", "1x")
    speed.add_row(
        "tokens the KV cache holds", f"{result.kv_tokens:,}", f"{result.base_kv_tokens:,}"
    )
    console.print(speed)
    if result.speculation is not None:
        _print_speculation(console, result)
    console.print(verdict(result))
    if result.kv_tokens_one_table != result.kv_tokens:
        console.print(
            f"with one block table for all layers, as for own prompts, the KV cache holds"
            f" {result.kv_tokens_one_table:,} tokens: layers with windows then keep every token"
        )


def _print_trips(console: Console, result: RemoteBasePlan) -> None:
    """Of a base elsewhere: what the pair, the way and the endpoint's price come to."""
    from rich.markup import escape
    from rich.table import Table

    inputs = result.inputs
    table = Table(f"base: {escape(inputs['base'])}, {inputs['base_mode']}", "")
    table.columns[1].justify = "right"
    table.add_row("step of the pair, at least", f"{result.step_ms:.3g} ms")
    table.add_row("round trip", f"{inputs['latency_ms']:g} ms")
    table.add_row("tokens a trip", f"{inputs['tokens_a_trip']:g}")
    table.add_row("questions a token", f"{inputs['questions_a_token']:g}")
    table.add_row("a token of one conversation, at least", f"{result.token_ms:.3g} ms")
    table.add_row("tokens/s, at most", f"{result.tokens_per_s:,.0f}")
    table.add_row("tokens the KV cache holds", f"{result.kv_tokens:,}")
    if result.dollars_per_1000_tokens is not None:
        table.add_row("1000 tokens of an answer", f"{result.dollars_per_1000_tokens:.3g} dollars")
    console.print(table)
    console.print(verdict(result))


def _print_speculation(console: Console, result: Plan) -> None:
    """With drafts: beside the base alone, and beside the base with the same drafter."""
    from rich.table import Table

    drafts = result.speculation
    assert drafts is not None
    table = Table(
        f"{drafts.speculative_tokens} drafts, {drafts.acceptance:g} accepted",
        "tokens/s, at most",
        "over base alone",
    )
    for column in table.columns[1:]:
        column.justify = "right"
    rows = {
        "base alone": result.base_tokens_per_s,
        "base alone, expert as its drafter": drafts.peer_tokens_per_s,
        "proxy-tuned": result.tokens_per_s,
        "proxy-tuned, expert drafts": drafts.tokens_per_s,
    }
    for label, speed in rows.items():
        table.add_row(label, f"{speed:,.0f}", f"{speed / result.base_tokens_per_s:.2f}x")
    console.print(table)


def _gib(size: float) -> str:
    return f"{size:.2f}" if size >= 0.1 else f"{size:.2g}"


def verdict(result: Plan | RemoteBasePlan) -> str:
    """One line: does it fit, and if not, what is short."""
    inputs = result.inputs
    need = inputs["batch"] * inputs["context"]
    if result.fits:
        return (
            f"fits: yes (KV cache for {result.kv_tokens / inputs['context']:,.1f} such sequences)"
        )
    gpu, tp = inputs["gpu"], inputs["tensor_parallel_size"]
    budget = gpu["memory_gib"] * inputs["gpu_memory_utilization"] - inputs["reserve_gib"]
    held = result.weights_gib["total"] / tp
    if held > budget:
        return (
            f"fits: no (weights take {held:.1f} GiB of each GPU, {max(budget, 0):.1f} GiB is there "
            "for weights and KV cache); use more or larger GPUs, or quantised members"
        )
    return (
        f"fits: no (the KV cache holds {result.kv_tokens:,} tokens, {need:,} are asked for); use "
        "a smaller batch or context, more GPUs, or --kv-cache-dtype fp8"
    )


def cmd_init() -> list[Any]:
    return [PlanSubcommand()]
