"""Columns of logits that no tokenizer names: padding at the end, and gaps before it."""

from typing import TYPE_CHECKING

import torch
from vllm.logger import init_logger

from proxy_vllm.composite.heads import MemberLogits
from proxy_vllm.config import ROLES
from proxy_vllm.kernels.columns import Columns

if TYPE_CHECKING:
    from proxy_vllm.composite.model import ProxyTunedForCausalLM

logger = init_logger(f"vllm.{__name__}")


def columns_of(model: "ProxyTunedForCausalLM") -> Columns:
    """Which of the base's tokens the formula covers."""
    total = model.vocab_size
    named = min(model.proxy_config.named_tokens or total, total)
    columns = Columns(0, total, min(named, *model.vocab_sizes.values()), named)
    if columns.some_missing:
        logger.info(
            "The base has %d tokens that a small member lacks: to keep their place among the"
            " others, every step sums over the small members' probabilities",
            columns.named - columns.shared,
        )
    return columns


def unnamed_columns(model: "ProxyTunedForCausalLM") -> torch.Tensor | None:
    """Gaps among the columns of this rank; None for none."""
    start, end = 0, model.vocab_sizes[ROLES[_forbidding(model)]]
    if model.sharded_heads is not None:
        start, wanted = model.sharded_heads.ranges[0][model.sharded_heads.rank]
        end = min(end, wanted)
    unnamed = [i - start for i in model.proxy_config.unnamed_tokens if start <= i < end]
    # vLLM builds models with the device as PyTorch's default.
    return torch.tensor(unnamed) if unnamed else None


def forbid_unnamed(logits: MemberLogits, model: "ProxyTunedForCausalLM") -> None:
    """What a small member forbids is never drawn unless alpha is 0: see `kernels/reference.py`."""
    forbidding = _forbidding(model)
    if model.members()[forbidding] is model.base:
        logits.members[forbidding] = logits.members[forbidding].clone()
    logits.members[forbidding].index_fill_(1, model.unnamed_columns, -torch.inf)


def _forbidding(model: "ProxyTunedForCausalLM") -> int:
    """The small member whose logits forbid gaps; the base's stay as they are."""
    return 2 if model.expert is model.base else 1
