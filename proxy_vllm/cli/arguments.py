"""The few options of our own, and how they enter vLLM's: every vLLM option keeps working."""

import argparse
import json
from pathlib import Path
from typing import Any

from proxy_vllm.config import KV_CACHE_TABLES, STOP_TOKENS
from proxy_vllm.errors import UserError
from proxy_vllm.methods import METHODS, method_fields


def json_object(text: str) -> dict[str, Any]:
    """For ``type=`` of an option that takes a JSON object."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"not JSON ({error})") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError('a JSON object is needed, like \'{"dtype": "float32"}\'')
    return value


def _json_file(name: str) -> dict[str, Any]:
    try:
        text = Path(name).read_text(encoding="utf-8")
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{name}: {error.strerror}") from None
    return json_object(text)


def add_proxy_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that name the trio to a parser that holds vLLM's engine options."""
    group = parser.add_argument_group("ProxyConfig", "Proxy-tuning: the members and their strength")
    group.add_argument(
        "--expert",
        help="the small tuned model, with --method dera the aligned one; with --enable-lora it may"
        " be left out, and requests name adapters of the antiexpert",
    )
    group.add_argument(
        "--antiexpert",
        help="the small model, untuned; with --method contrastive the amateur",
    )
    group.add_argument(
        "--method",
        default="proxy",
        choices=METHODS,
        help="the formula: contrastive takes the base for the expert, dera for the antiexpert, and"
        " cfg for both, with a negative prompt (docs/methods.md; default: proxy)",
    )
    group.add_argument(
        "--alpha",
        help="strength of requests that name no proxy_alpha; 0 is the base alone (default: 1.0, of"
        " contrastive 0.5)",
    )
    group.add_argument(
        "--beta",
        metavar="SHARE",
        help="never draw tokens that the base gives less than this share of its largest"
        " probability, for requests that name no proxy_beta; 0 is off (default: 0, of contrastive"
        " 0.1)",
    )
    group.add_argument(
        "--alpha-range",
        nargs=2,
        type=float,
        default=(-10.0, 10.0),
        metavar=("LOW", "HIGH"),
        help="what a request may ask for as proxy_alpha (default: -10 10)",
    )
    for role in ("expert", "antiexpert"):
        group.add_argument(
            f"--{role}-args",
            type=json_object,
            default={},
            metavar="JSON",
            help=f"vLLM ModelConfig fields of the {role} alone, such as"
            ' \'{"quantization": "fp8", "revision": "main"}\'',
        )
    group.add_argument(
        "--speculative-tokens",
        default=None,
        metavar="K",
        help="let the expert draft K tokens a step, or auto: answers stay the same, token for token"
        " (default: no drafts)",
    )
    for role in ("base", "expert", "antiexpert"):
        group.add_argument(
            f"--{role}-chat-template",
            default=None,
            metavar="TEMPLATE",
            help=f"how the {role} reads a chat: auto (its tokenizer's own), plain, llama-2,"
            " llama-2-paper, or a file (default: "
            + ("the expert's own, if it has one)" if role == "base" else "what the base reads)"),
        )
    group.add_argument(
        "--stop-tokens",
        choices=STOP_TOKENS,
        default="both",
        help="whose end tokens end an answer (default: both)",
    )
    group.add_argument(
        "--allow-tokenizer-mismatch",
        action="store_true",
        help="serve members whose tokenizers disagree on a token id",
    )
    group.add_argument(
        "--tokenizer-map",
        type=_json_file,
        default={},
        metavar="FILE",
        help="JSON of token ids of the small members that are others in the base, or have another"
        """ name there: {"expert": {"its id": the base's id}, "antiexpert": {...}}""",
    )
    group.add_argument(
        "--own-prompts",
        action="store_true",
        help="let requests give each model a prompt of its own (implied by a chat template for the"
        " expert or the antiexpert)",
    )
    group.add_argument(
        "--fused-head-max-batch",
        type=int,
        default=0,
        metavar="ROWS",
        help="draw tokens straight from the head weights in steps of at most this many rows"
        " (default: 0, off)",
    )
    group.add_argument(
        "--sampler-cuda-graphs",
        action="store_true",
        help="replay heads, combination and draw of a step as one CUDA graph (not yet measured on"
        " a GPU)",
    )
    from proxy_vllm.cli.remote_base import add_remote_base_arguments

    add_remote_base_arguments(parser)
    group.add_argument(
        "--kv-cache-tables",
        choices=KV_CACHE_TABLES,
        default="auto",
        help="one block table for all layers, several for windows and full attention apart, or what"
        " holds more requests (default: auto)",
    )


def proxy_config(args: argparse.Namespace):
    """The ``ProxyConfig`` that the parsed options describe."""
    from proxy_vllm.cli.remote_base import remote_base
    from proxy_vllm.config import ProxyConfig
    from proxy_vllm.own_prompts.chat_templates import resolve_template

    adapters = not args.expert and bool(getattr(args, "enable_lora", False))
    return ProxyConfig(
        **method_fields(args.method, args.expert, args.antiexpert, args.alpha, args.beta, adapters),
        alpha_range=tuple(args.alpha_range),
        expert_args=args.expert_args,
        antiexpert_args=args.antiexpert_args,
        allow_tokenizer_mismatch=args.allow_tokenizer_mismatch,
        tokenizer_map=args.tokenizer_map,
        expert_chat_template=resolve_template("expert", args.expert_chat_template),
        antiexpert_chat_template=resolve_template("antiexpert", args.antiexpert_chat_template),
        stop_tokens=args.stop_tokens,
        own_prompts=args.own_prompts,
        fused_head_max_batch=args.fused_head_max_batch,
        sampler_cuda_graphs=args.sampler_cuda_graphs,
        speculative_tokens=args.speculative_tokens,
        remote_base=remote_base(args),
        changed_tokens_every=getattr(args, "changed_tokens_every", 0),
        kv_cache_tables=args.kv_cache_tables,
        adapters=adapters,
    )


def name_base(args: argparse.Namespace, proxy: Any) -> None:
    """Set ``args.model`` to the base of the engine: the antiexpert where the base is elsewhere.

    Raises:
        UserError: there is none.
    """
    if proxy.remote_base is None:
        args.model = getattr(args, "model_tag", None) or getattr(args, "model", None)
        if not args.model:
            raise UserError(
                "a base model is needed: name its folder or hub name first, or --base-url"
            )
        return
    args.model = proxy.antiexpert
    if getattr(args, "served_model_name", None) is None:
        args.served_model_name = [proxy.remote_base.model]


def apply_to_namespace(args: argparse.Namespace, *, steers_remote_base: bool = False) -> None:
    """Check the trio and write it into vLLM's own options, in place.

    Args:
        args: what vLLM's parser with ``add_proxy_arguments`` parsed; ``args.model`` is the base.
        steers_remote_base: whether the caller steers a base elsewhere. Without that, an engine
            would answer as if the antiexpert were the base.

    Raises:
        UserError: members that do not fit together or cannot be read.
    """
    from proxy_vllm.engine_args import prepare_engine_args

    proxy = proxy_config(args)
    if proxy.remote_base is not None and not steers_remote_base:
        raise UserError("--base-url is for `proxy-vllm serve` and `proxy-vllm generate`")
    name_base(args, proxy)
    kwargs = prepare_engine_args(
        vars(args),
        proxy,
        base_chat_template=args.base_chat_template,
        caps_max_tokens=True,
    )
    for name, value in kwargs.items():
        setattr(args, name, value)
