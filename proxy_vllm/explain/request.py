"""How a request asks for explanations, and what it is refused for."""

from copy import copy
from typing import TYPE_CHECKING, Any

from proxy_vllm.config import ProxyConfig
from proxy_vllm.errors import UserError
from proxy_vllm.member_alone import member_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams

# Keys of `SamplingParams.extra_args`, and over HTTP of `vllm_xargs`.
EXPLAIN_KEY = "proxy_explain"
TOP_KEY = "proxy_explain_top"
EXPLAIN_KEYS = (EXPLAIN_KEY, TOP_KEY)
# Set in the front end: the request itself asked for no log-probabilities.
ALONE_KEY = "proxy_explain_alone"

DEFAULT_TOP = 5
MAX_TOP = 20


def top_of(extra_args: dict[str, Any] | None) -> int | None:
    """How many of the likeliest tokens a request wants explained; None if it does not ask.

    Raises:
        UserError: a value that cannot be used.
    """
    named = extra_args or {}
    asks, top = named.get(EXPLAIN_KEY), named.get(TOP_KEY)
    # vLLM reads true in `vllm_xargs` as a number.
    if asks is not None and asks not in (True, False):
        raise UserError(f"{EXPLAIN_KEY} is {asks!r}: it must be true or false")
    if top is None:
        return DEFAULT_TOP if asks else None
    if isinstance(top, bool) or not isinstance(top, (int, float)) or top != int(top):
        raise UserError(f"{TOP_KEY} is {top!r}: it must be a whole number")
    if not 1 <= top <= MAX_TOP:
        raise UserError(f"{TOP_KEY} is {top:g}: it must lie in 1 .. {MAX_TOP}")
    if not asks:
        raise UserError(f"{TOP_KEY} is nothing without {EXPLAIN_KEY}: true")
    return int(top)


def asked_top(extra_args: dict[str, Any] | None) -> int | None:
    """``top_of`` at admission, which refuses what is set later."""
    if ALONE_KEY in (extra_args or {}):
        raise UserError(f"{ALONE_KEY} is not for requests to set")
    top = top_of(extra_args)
    if top is not None:
        member_of(extra_args, EXPLAIN_KEYS)
    return top


def worker_top(params: Any) -> int:
    """``top_of`` in a worker, which must not raise: 0 for a request that does not ask."""
    try:
        return top_of(getattr(params, "extra_args", None)) or 0
    except UserError:
        return 0


def without_rows(params: "SamplingParams") -> "SamplingParams":
    """Parameters for the worker's own sampler: what they ask for beside explanations."""
    if not (params.extra_args or {}).get(ALONE_KEY):
        return params
    params = copy(params)
    params.logprobs = None
    return params


def check_engine(vllm_config: "VllmConfig") -> None:
    """Raise ``UserError`` if no request of this engine can be explained."""
    from vllm import envs

    proxy = ProxyConfig.from_vllm_config(vllm_config)
    model, speculative = vllm_config.model_config, vllm_config.speculative_config
    found = {
        "with a base elsewhere (--base-url), of which only a few probabilities are known": (
            proxy.remote_base is not None
        ),
        "with --return-sampling-mask": model.return_sampling_mask,
        "with --enable-trace-replay": model.enable_trace_replay,
        "with watermarks": vllm_config.watermark_config is not None,
        "with --enable-batch-sharded-sampling": (
            vllm_config.parallel_config.enable_batch_sharded_sampling
        ),
        "with VLLM_COMPUTE_NANS_IN_LOGITS": envs.VLLM_COMPUTE_NANS_IN_LOGITS,
        "with --speculative-config (--speculative-tokens goes together with it)": (
            speculative is not None and not proxy.expert_drafts
        ),
    }
    for name, present in found.items():
        if present:
            raise UserError(f"{EXPLAIN_KEY}: this engine runs {name}, which excludes it")


def check_parameters(params: Any) -> bool:
    """Whether ``params`` ask for explanations.

    Raises:
        UserError: they cannot be had together with the rest of ``params``.
    """
    if asked_top(getattr(params, "extra_args", None)) is None:
        return False
    if getattr(params, "flat_logprobs", False):
        raise UserError(f"{EXPLAIN_KEY} with flat_logprobs: leave one of them out")
    return True
