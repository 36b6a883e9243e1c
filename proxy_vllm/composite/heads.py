"""The three output heads: read through their weights, or under tensor parallelism by columns.

Combining before communicating means that ranks exchange what the sampler needs (a pair a row, or a
few counts) instead of three gathered ``[N, V]``; what needs the whole distribution gathers one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import TYPE_CHECKING

import torch
import torch.nn as nn
from vllm.distributed import get_tp_group, tensor_model_parallel_all_gather
from vllm.logger import init_logger

from proxy_vllm.composite.formula import combine_logits
from proxy_vllm.config import ROLES
from proxy_vllm.errors import UserError
from proxy_vllm.kernels.columns import Columns, shift_of_missing
from proxy_vllm.kernels.fused_head import fused_head_sample, supports
from proxy_vllm.kernels.row_parameters import RowParameters, Steering
from proxy_vllm.kernels.sharded import (
    Exchange,
    Range,
    changes_rank,
    common,
    merge_ranks,
    realign_columns,
)
from proxy_vllm.member_alone import ALPHA_OF_MEMBER

if TYPE_CHECKING:
    from proxy_vllm.composite.model import ProxyTunedForCausalLM

logger = init_logger(f"vllm.{__name__}")

# Models whose `compute_logits` is vLLM's logits processor over `lm_head` and nothing more, and that
# lack `compute_logits_local`, which is the same without the gathering.
_PLAIN_HEADS = {"GPT2LMHeadModel", "OPTForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}


def shard_ranges(head: nn.Module, world_size: int) -> list[Range]:
    """The tokens whose columns each rank holds of one head, vocabulary padding left out."""
    width, size = head.num_embeddings_per_partition, head.org_vocab_size
    return [(min(r * width, size), min((r + 1) * width, size)) for r in range(world_size)]


def has_local_logits(member: nn.Module) -> bool:
    """Whether vLLM can give a member's logits without gathering them."""
    plain = type(member).__name__ in _PLAIN_HEADS
    return hasattr(member, "lm_head") and (plain or hasattr(member, "compute_logits_local"))


def local_logits(member: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """This rank's columns ``[N, padded n]`` of one member's logits."""
    if hasattr(member, "compute_logits_local"):
        return member.compute_logits_local(hidden)
    return member.logits_processor(member.lm_head, hidden, skip_gather=True)


def each_once(
    members: Sequence[nn.Module], compute: Callable[[int, nn.Module], torch.Tensor]
) -> list[torch.Tensor]:
    """``compute`` of each member and its number; of one that stands there twice the same tensor."""
    results: list[torch.Tensor] = []
    for i, member in enumerate(members):
        first = members.index(member)
        results.append(results[first] if first < i else compute(i, member))
    return results


@dataclass
class MemberLogits:
    """Logits of base, expert and antiexpert: whole, or one rank's on the base's boundaries."""

    members: list[torch.Tensor]  # 3 x [N, V_m], or [N, up to n]
    columns: Columns
    sharded: bool

    def select(self, rows: torch.Tensor) -> "MemberLogits":
        return replace(self, members=[logits[rows] for logits in self.members])

    def with_members_alone(
        self, steering: Steering, unnamed: torch.Tensor | None = None
    ) -> tuple["MemberLogits", Steering]:
        """Rows that ask for one small member: its logits in the base's place, and alpha 0.

        The formula then is that member alone, whatever draws from it. Tokens that no tokenizer
        names (``unnamed`` holds columns of some), and those that the member lacks, are never drawn.
        """
        alpha, (base, *small) = steering.alpha, self.members
        named = self.columns.local(self.columns.named, base.shape[1])
        dtype = reduce(torch.promote_types, (logits.dtype for logits in self.members))
        # Not in place, since the base may stand there as a small member too; and its rows as far
        # apart as they were, for which the kernels are compiled.
        mixed = base.new_empty_strided(base.shape, base.stride(), dtype=dtype).copy_(base)
        for role, logits in zip(ROLES[1:], small, strict=True):
            alone = (alpha == ALPHA_OF_MEMBER[role])[:, None]
            width = min(named, logits.shape[1])
            mixed[:, :width] = torch.where(alone, logits[:, :width], mixed[:, :width])
            mixed[:, width:].masked_fill_(alone, -torch.inf)
        if unnamed is not None:
            own = mixed[:, unnamed].masked_fill_(alpha.isinf()[:, None], -torch.inf)
            mixed.index_copy_(1, unnamed, own)
        alpha = torch.where(alpha.isinf(), 0.0, alpha)
        return replace(self, members=[mixed, *small]), replace(steering, alpha=alpha)


class ShardedHeads:
    """Local logits of three members on the base's shard boundaries.

    Members padded to different vocabulary sizes have different boundaries; columns that belong to
    another rank's shard of the base then travel, those of the small members alone.
    """

    def __init__(self, members: list[nn.Module], columns: Columns, compiled: bool = False) -> None:
        group = get_tp_group()
        self.members = members
        self.compiled = compiled
        self.exchange = Exchange(group.device_group)
        self.rank = group.rank_in_group
        self.ranges = [shard_ranges(member.lm_head, group.world_size) for member in members]
        # Every rank's shard of a gathered tensor has the same, padded width.
        self.width = members[0].lm_head.num_embeddings_per_partition
        self.columns = replace(columns, start=self.ranges[0][self.rank][0])

    @staticmethod
    def supports(members: list[nn.Module]) -> bool:
        """Whether there are shards, and every member can give its own."""
        return get_tp_group().world_size > 1 and all(map(has_local_logits, members))

    def local(self, hidden: list[torch.Tensor]) -> MemberLogits:
        """This rank's columns of each member for hidden states ``[N, d_m]``."""
        wanted = self.ranges[0]

        def shard_of(i: int, member: nn.Module) -> torch.Tensor:
            own = self.ranges[i]
            start, end = own[self.rank]
            shard = local_logits(member, hidden[i])[:, : end - start]
            if own != wanted:
                # Past the base's vocabulary nothing is wanted; before its end nothing is missing
                # but the columns that this member does not have.
                shard = realign_columns(shard.contiguous(), own, wanted, self.exchange)
            return shard

        return MemberLogits(each_once(self.members, shard_of), self.columns, sharded=True)

    def combined_local(
        self, logits: MemberLogits, steering: Steering, masked: bool = True
    ) -> torch.Tensor:
        """This rank's columns ``[N, width]`` float32 of the distribution, padded as vLLM's are."""
        base, expert, antiexpert = logits.members
        # Also of a rank without columns: the others wait for it.
        shift = shift_of_missing(expert, antiexpert, self.columns, self.exchange.gather)
        own = combine_logits(
            base,
            expert,
            antiexpert,
            steering.alpha,
            self.columns,
            missing_shift=shift,
            plausibility=steering.plausibility,
            gather=self.exchange.gather,
            masked=masked,
            compiled=self.compiled,
        )
        return nn.functional.pad(own, (0, self.width - own.shape[1]))

    def combined(
        self, logits: MemberLogits, steering: Steering, masked: bool = True
    ) -> torch.Tensor:
        """The whole distribution ``[N, V]`` float32 on every rank, from one gather."""
        own = self.combined_local(logits, steering, masked)
        return tensor_model_parallel_all_gather(own)[:, : self.columns.total]

    def shared_rows(self) -> list[Range] | None:
        """Rows of this rank's three head weights that hold the base's columns of this rank.

        None where a member's columns for some rank lie on another, or a rank has none.
        """
        wanted = self.ranges[0]
        if any(changes_rank(own, wanted) for own in self.ranges):
            return None
        shared = [[common(*pair) for pair in zip(own, wanted)] for own in self.ranges]
        if any(start == end for ranges in shared for start, end in ranges):
            return None
        firsts = [own[self.rank][0] for own in self.ranges]
        rows = [ranges[self.rank] for ranges in shared]
        return [(start - first, end - first) for first, (start, end) in zip(firsts, rows)]


class FusedHeads:
    """The members' head weights, for drawing tokens without logits in memory.

    Fit for vLLM's plain heads; a head that is quantised or carries an adapter, or whose model does
    more than multiply, keeps its own logits. Over several ranks each reads its rows of the heads,
    and they exchange a score and a token a row.
    """

    def __init__(
        self, members: list[nn.Module], columns: Columns, sharded: ShardedHeads | None = None
    ) -> None:
        heads = [member.lm_head for member in members]
        processors = [member.logits_processor for member in members]
        # Rows past the checkpoint's vocabulary are vLLM's padding.
        rows = [(0, head.org_vocab_size) for head in heads]
        self.columns, self.exchange = columns, None
        if sharded is not None:
            shared = sharded.shared_rows()
            assert shared is not None
            rows = shared
            self.columns, self.exchange = sharded.columns, sharded.exchange
        self.weights = [h.weight.data[first:last] for h, (first, last) in zip(heads, rows)]
        self.soft_caps = [processor.soft_cap for processor in processors]
        self.scales = [processor.scale for processor in processors]

    @staticmethod
    def supports(members: list[nn.Module], dtypes: list[torch.dtype]) -> bool:
        """Whether the weights and these hidden dtypes are all there is to each member's logits."""
        if not all(has_local_logits(m) and hasattr(m, "logits_processor") for m in members):
            return False
        processors = [member.logits_processor for member in members]
        return all(
            p.head_dtype in (None, dtype) for p, dtype in zip(processors, dtypes)
        ) and supports([m.lm_head for m in members], [p.soft_cap for p in processors])

    def sample(
        self,
        hidden: list[torch.Tensor],  # 3 x [B, d_m]
        rows: RowParameters,
    ) -> torch.Tensor:  # [B] int64
        """One token a row; no row may have a filter."""
        tokens, scores = fused_head_sample(
            hidden,
            self.weights,
            rows,
            soft_caps=self.soft_caps,
            scales=self.scales,
            columns=self.columns,
        )
        return tokens if self.exchange is None else merge_ranks(self.exchange, scores, tokens)


def fused_heads_of(model: "ProxyTunedForCausalLM") -> FusedHeads | None:
    """The heads' weights; None, so that logits are stored, where vocabularies do not fit.

    Raises:
        UserError: a member's head cannot be read as one weight matrix.
    """
    members, sharded = model.members(), model.sharded_heads
    dtypes = [model.member_configs[role].model_config.dtype for role in ROLES]
    ranks = get_tp_group().world_size
    if (ranks > 1 and sharded is None) or not FusedHeads.supports(members, dtypes):
        raise UserError(
            "--fused-head-max-batch: a member's output head is quantised or does more than"
            " multiply; leave the option out"
        )
    if model.columns.some_missing or model.proxy_config.unnamed_tokens:
        logger.warning(
            "--fused-head-max-batch is without effect: the base has tokens that %s",
            "a small member lacks" if model.columns.some_missing else "no tokenizer names",
        )
        return None
    if sharded is not None and sharded.shared_rows() is None:
        logger.warning(
            "--fused-head-max-batch is without effect: %d ranks split the vocabularies of %s"
            " tokens at different places",
            ranks,
            ", ".join(str(model.vocab_sizes[role]) for role in ROLES),
        )
        return None
    return FusedHeads(members, model.columns, sharded)
