"""``ProxyTunedForCausalLM``: three vLLM models that run as one."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn
from vllm.config import VllmConfig
from vllm.config.compilation import CompilationMode
from vllm.distributed import get_pp_group
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.model_executor.models.interfaces import SupportsPP, supports_pp
from vllm.model_executor.models.utils import maybe_prefix
from vllm.sequence import IntermediateTensors

from proxy_vllm.composite.attention import give_own_attention, has_states, separate_attention
from proxy_vllm.composite.formula import combine_logits
from proxy_vllm.composite.heads import (
    FusedHeads,
    MemberLogits,
    ShardedHeads,
    each_once,
    fused_heads_of,
)
from proxy_vllm.composite.member_configs import member_vllm_configs
from proxy_vllm.composite.members import (
    build_member,
    load_member,
    naming_member,
    outlive_graphs,
    retie_embeddings,
    weight_bytes,
)
from proxy_vllm.composite.named_columns import columns_of, forbid_unnamed, unnamed_columns
from proxy_vllm.composite.packed_rows import PackedRows
from proxy_vllm.composite.shared_weights import build_sharing
from proxy_vllm.composite.token_map import number_as_base
from proxy_vllm.config import ROLES, ProxyConfig
from proxy_vllm.errors import UserError
from proxy_vllm.kernels.row_parameters import Steering
from proxy_vllm.own_prompts.prompts import unsupported_reason

if TYPE_CHECKING:
    from proxy_vllm.own_prompts.inputs import MemberInputs

logger = init_logger(f"vllm.{__name__}")


# Rows whose logits are computed at once: a batch of generated tokens, and little memory for more.
_LOGIT_ROWS = 1024


class ProxyTunedForCausalLM(nn.Module, SupportsPP):
    """Base, expert and antiexpert behind vLLM's interface of a single text-generation model.

    ``forward`` returns one tensor ``[T, width]``, as vLLM's runners expect: the hidden states side
    by side and the row's alpha (see ``packed_rows.py``). So whatever vLLM does with the rows of a
    hidden state (sampling positions, prompt log-probabilities, draft verification, gathering over
    ranks), each row keeps its own alpha.

    A small member that is the base (``ProxyConfig.same_weights``) has no weights, no pass and no
    cache of its own; where it reads another prompt, it has a pass and a cache and no weights.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.proxy_config = ProxyConfig.from_vllm_config(vllm_config)
        self.vllm_config = vllm_config
        self.config = vllm_config.model_config.hf_config
        self.vocab_size = vllm_config.model_config.get_vocab_size()

        self.member_configs = member_vllm_configs(vllm_config, self.proxy_config)
        self.vocab_sizes = {
            role: config.model_config.get_vocab_size()
            for role, config in self.member_configs.items()
        }
        shared = self.proxy_config.same_weights
        # Roles with weights of their own, and those that run.
        self.loaded_roles = [role for role in ROLES if role not in shared]
        self.run_roles = [role for role in ROLES if self.proxy_config.runs(role)]
        for role in ROLES:
            if role not in self.run_roles:
                # No submodule, or vLLM would find every layer twice.
                object.__setattr__(self, role, getattr(self, shared[role]))
                continue
            config, name = self.member_configs[role], maybe_prefix(prefix, role)
            if role in shared:
                setattr(self, role, build_sharing(role, config, name, getattr(self, shared[role])))
                continue
            member = build_member(role, config, name)
            setattr(self, role, member)
            if moves := self.proxy_config.moved_tokens(role):
                number_as_base(role, member, moves)
        members = {role: getattr(self, role) for role in self.run_roles}
        give_own_attention(members, self.member_configs)
        if unsupported_reason(vllm_config) is None:
            separate_attention(members)
        if vllm_config.parallel_config.pipeline_parallel_size > 1:
            for role in self.run_roles:
                if not supports_pp(getattr(self, role)):
                    raise UserError(
                        f"{role}: {type(getattr(self, role)).__name__} does not support"
                        " --pipeline-parallel-size; use --tensor-parallel-size"
                    )
        self.compiled = vllm_config.compilation_config.mode != CompilationMode.NONE
        self.packed = PackedRows(
            {role: self.member_configs[role].model_config.dtype for role in self.run_roles}
        )
        self.hidden_dtype = self.packed.dtype
        self.columns = columns_of(self)
        self.sharded_heads: ShardedHeads | None = None
        if get_pp_group().is_last_rank and ShardedHeads.supports(self.members()):
            self.sharded_heads = ShardedHeads(self.members(), self.columns, self.compiled)
            # vLLM looks for an attribute of this name to decide whether it may share out a batch
            # over the ranks for sampling.
            self.compute_logits_local = self._compute_logits_local
        self.register_buffer("unnamed_columns", unnamed_columns(self), persistent=False)
        # Taken before vLLM repacks weights into forms that are no parameters (as it does on a CPU).
        self.member_weight_bytes = self._weight_bytes()
        self.weights_loaded = False
        self.fused_heads: FusedHeads | None = None
        # Ids of members with fewer tokens than the base, made in the first, largest run.
        self._ids: dict[str, torch.Tensor] = {}
        # What ``compute_logits`` combined, for explanations on the V1 runner; None: not kept.
        self.kept_logits: list[tuple[MemberLogits, Steering]] | None = None
        # Whether some row of this step is a small member's alone: told by the runner, since the
        # model would have to wait for the device to know.
        self.some_alone = False

    def members(self) -> list[nn.Module]:
        """Base, expert and antiexpert; one that is the base is the very same module."""
        return [getattr(self, role) for role in ROLES]

    def _weight_bytes(self) -> dict[str, int]:
        return {role: weight_bytes(getattr(self, role)) for role in self.loaded_roles}

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.base.embed_input_ids(input_ids)

    def make_empty_intermediate_tensors(
        self, batch_size: int, dtype: torch.dtype, device: torch.device
    ) -> IntermediateTensors:
        tensors = {}
        for role in self.run_roles:
            own = self.member_configs[role].model_config.dtype
            empty = getattr(self, role).make_empty_intermediate_tensors(batch_size, own, device)
            tensors.update({f"{role}.{name}": tensor for name, tensor in empty.items()})
        return IntermediateTensors(tensors)

    def forward(
        self,
        input_ids: torch.Tensor | None,  # [T]
        positions: torch.Tensor,  # [T]
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        alpha: torch.Tensor | None = None,  # [T] float32; None: the server's steering
        plausibility: torch.Tensor | None = None,  # [2, T] float32, given with alpha
        members: "tuple[MemberInputs, ...] | None" = None,  # own inputs of each; None: the common
    ) -> torch.Tensor | IntermediateTensors:
        """Run the three members, over the same tokens unless ``members`` gives each its own.

        Returns:
            On the last pipeline rank packed rows ``[T, width]``, else the members'
            intermediate tensors, their names prefixed with the role.
        """
        if members is not None:
            return self._pack(self._forward_own(members), alpha, plausibility)
        outputs = {}
        for role in self.run_roles:
            stage = None
            if intermediate_tensors is not None:
                stage = IntermediateTensors(
                    {
                        name.removeprefix(f"{role}."): tensor
                        for name, tensor in intermediate_tensors.items()
                        if name.startswith(f"{role}.")
                    }
                )
            ids = None if input_ids is None else self._known_ids(role, input_ids)
            output = getattr(self, role)(ids, positions, intermediate_tensors=stage)
            outputs[role] = self._kept(role, output)
        if not get_pp_group().is_last_rank:
            return IntermediateTensors(
                {
                    f"{role}.{name}": tensor
                    for role, output in outputs.items()
                    for name, tensor in output.items()
                }
            )
        return self._pack(outputs, alpha, plausibility)

    def _kept(self, role: str, output: Any) -> Any:
        return output if role == self.run_roles[-1] else outlive_graphs(output)

    def _forward_own(self, members: "tuple[MemberInputs, ...]") -> dict[str, torch.Tensor]:
        """Hidden states of each member, ``[T, d_m]`` in the order of the scheduler's batch.

        Rows that a member does not have are zero; nothing is sampled from them.
        """
        slot_mapping = get_forward_context().slot_mapping
        outputs: dict[str, torch.Tensor] = {}
        for role, own in zip(ROLES, members, strict=True):
            if role not in self.run_roles:
                continue
            if own.absent and self.packed.widths:
                shape = (own.input_ids.shape[0], self.packed.widths[role])
                outputs[role] = own.positions.new_zeros(shape, dtype=self.hidden_dtype)
                continue
            # KV-cache writes take their slots from here, by layer.
            slot_mapping.update(own.slots_of_layers())
            if self.vocab_sizes[role] < self.vocab_size:
                # As in `_known_ids`; in place, since graphs read this very buffer.
                own.input_ids.masked_fill_(own.input_ids >= self.vocab_sizes[role], 0)
            hidden = self._kept(role, getattr(self, role)(own.input_ids, own.positions))
            if own.rows is not None:
                packed = hidden
                hidden = torch.zeros_like(packed)
                hidden[own.rows] = packed[: own.rows.shape[0]]
            outputs[role] = hidden
        return outputs

    def _known_ids(self, role: str, ids: torch.Tensor) -> torch.Tensor:  # [T] -> [T]
        """Token ids as a member reads them: one that its vocabulary lacks is its token 0.

        Looked up, such a token would lie outside the embedding table. The result has one address
        for every step, as piecewise CUDA graphs want of their inputs.
        """
        size = self.vocab_sizes[role]
        if size >= self.vocab_size:
            return ids
        buffer = self._ids.get(role)
        if buffer is None or len(buffer) < len(ids):
            most = self.vllm_config.scheduler_config.max_num_batched_tokens
            buffer = self._ids[role] = ids.new_zeros(max(most, len(ids)))
        return buffer[: len(ids)].copy_(ids).masked_fill_(ids >= size, 0)

    def _pack(
        self,
        hidden: dict[str, torch.Tensor],
        alpha: torch.Tensor | None,
        plausibility: torch.Tensor | None,
    ) -> torch.Tensor:
        if alpha is None or plausibility is None:
            values = (self.proxy_config.alpha, *self.proxy_config.plausibility_of(None))
            rows = hidden["base"]
            alpha, *both = (rows.new_full((len(rows),), v, dtype=torch.float32) for v in values)
            plausibility = torch.stack(both)
        return self.packed.pack(hidden, alpha, plausibility)

    def unpack(self, packed: torch.Tensor) -> tuple[list[torch.Tensor], Steering]:  # 3 x [N, d_m]
        """Take apart rows that ``forward`` returned: hidden state of each member, steering."""
        hidden, steering = self.packed.unpack(packed)
        shared = self.proxy_config.same_weights
        return [hidden[r if r in hidden else shared[r]] for r in ROLES], steering

    def logits_for_sampling(self, hidden: list[torch.Tensor]) -> MemberLogits:
        """Logits of each member: whole, ``3 x [N, V_m]``, or this rank's columns of them."""
        if self.sharded_heads is not None:
            logits = self.sharded_heads.local(hidden)
        else:
            members = each_once(self.members(), lambda i, member: member.compute_logits(hidden[i]))
            logits = MemberLogits(members, self.columns, sharded=False)
        if self.unnamed_columns is not None and logits.members[1] is not None:
            forbid_unnamed(logits, self)
        return logits

    def logits_and_steering(
        self, hidden: list[torch.Tensor], steering: Steering
    ) -> tuple[MemberLogits, Steering]:
        """What to combine for rows that ``unpack`` gave, those of one member alone among them."""
        logits = self.logits_for_sampling(hidden)
        if self.some_alone and logits.members[0] is not None:
            return logits.with_members_alone(steering, self.unnamed_columns)
        return logits, steering

    def prepare_fused_heads(self) -> None:
        """Set ``fused_heads`` once the weights are in their final form, where they fit."""
        if get_pp_group().is_last_rank:
            self.fused_heads = fused_heads_of(self)

    def combine(
        self,
        logits: MemberLogits,
        steering: Steering,  # of N rows
        rows: torch.Tensor | None = None,
        masked: bool = True,
    ) -> torch.Tensor:  # [N or rows, V] float32
        """The formula over what ``logits_for_sampling`` gave, for some rows or all.

        Args:
            masked: whether some row may lose implausible tokens, which costs a GPU a launch.
        """
        if rows is not None:
            logits, steering = logits.select(rows), steering.select(rows)
        if logits.sharded:
            assert self.sharded_heads is not None
            return self.sharded_heads.combined(logits, steering, masked)
        base, expert, antiexpert = logits.members
        return combine_logits(
            base,
            expert,
            antiexpert,
            steering.alpha,
            logits.columns,
            plausibility=steering.plausibility,
            masked=masked,
            compiled=self.compiled,
        )

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Combined logits ``[N, V]`` in float32 of rows that ``forward`` returned."""
        if hidden_states.shape[0] <= _LOGIT_ROWS:
            return self._combined_logits(hidden_states)
        # Rows of prompt log-probabilities: four tensors of them at once, beside the result.
        out = None
        for start in range(0, hidden_states.shape[0], _LOGIT_ROWS):
            part = self._combined_logits(hidden_states[start : start + _LOGIT_ROWS])
            if part is None:
                return None
            if out is None:
                out = part.new_empty(hidden_states.shape[0], part.shape[1])
            out[start : start + _LOGIT_ROWS] = part
        return out

    def _combined_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        hidden, steering = self.unpack(hidden_states)
        logits, steering = self.logits_and_steering(hidden, steering)
        if logits.members[0] is None:
            return None  # vLLM gathers logits on one rank only where it cannot on all
        if self.kept_logits is not None:
            self.kept_logits.append((logits, steering))
        return self.combine(logits, steering)

    def _compute_logits_local(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """This rank's columns ``[N, padded width]`` of ``compute_logits``."""
        assert self.sharded_heads is not None
        logits, steering = self.logits_and_steering(*self.unpack(hidden_states))
        return self.sharded_heads.combined_local(logits, steering)

    @property
    def packed_width(self) -> int:
        """Width of ``forward``'s output; 0 until it has run."""
        return self.packed.width

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load the base from ``weights`` and the small members from their own checkpoints."""
        with naming_member("base", self.member_configs["base"]):
            loaded = self.base.load_weights(weights)
        for role in self.loaded_roles[1:]:
            load_member(role, getattr(self, role), self.member_configs[role])
        if not self.weights_loaded:
            for role in self.loaded_roles:
                retie_embeddings(getattr(self, role), self.member_configs[role])
            self.member_weight_bytes = self._weight_bytes()
        self.weights_loaded = True
        # vLLM compares what was loaded with what exists. The small members' loaders did so for
        # theirs; a base that does not tell is taken at its word, as vLLM does.
        names = {name for name, _ in self.named_parameters()}
        if loaded is None:
            return names
        return {f"base.{name}" for name in loaded} | {
            name for name in names if not name.startswith("base.")
        }

    def get_mamba_state_copy_funcs(self, mamba_types: set) -> dict:
        """What copies a state across blocks, of whichever member has states of such a type."""
        found: dict = {}
        for member in self.members():
            if hasattr(member, "get_mamba_state_copy_funcs"):
                found |= member.get_mamba_state_copy_funcs(mamba_types)
        return found

    def get_model_state_cls(self) -> type:
        """Model Runner V2's hook for per-request state."""
        from proxy_vllm.worker.model_state import ProxyHybridModelState, ProxyModelState

        return ProxyHybridModelState if has_states(self) else ProxyModelState
