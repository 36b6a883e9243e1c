"""Thresholds of what the base finds plausible (``plausible`` in ``kernels/reference.py``)."""

import math
from typing import TYPE_CHECKING, Any

from proxy_vllm.errors import UserError

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams

BETA_KEY = "proxy_beta"
# What logits of implausible tokens lose where a request's own constraints may leave no other: far
# above differences of logits, and their order among each other remains.
_FAR_BELOW = 8192.0
# Parameters that may rule out all that the base finds plausible.
_CONSTRAINTS = (
    "structured_outputs",
    "allowed_token_ids",
    "bad_words",
    "min_tokens",
    "thinking_token_budget",
)


def drop_of(params: "SamplingParams | None") -> float:
    """What the logits of implausible tokens lose in a request (``Plausibility.drop``)."""
    constrained = any(getattr(params, name, None) for name in _CONSTRAINTS)
    return _FAR_BELOW if constrained else math.inf


def check_beta(value: Any, name: str = BETA_KEY) -> float:
    """Return ``value`` as a float from 0 to 1, or raise ``UserError``."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0 <= number <= 1:
        raise UserError(f"{name} is {value!r}: it must be a number from 0 (off) to 1")
    return number
