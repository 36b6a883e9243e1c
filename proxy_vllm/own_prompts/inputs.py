"""Inputs and attention metadata of each model, where models read different prompts.

Two ways to make a model's batch out of the scheduler's (see prompts.py for the arithmetic):

- *shifted*: every row exists for every model, only positions, sequence lengths and slots differ.
  This is every decode step. One kernel writes persistent buffers, which CUDA graphs replay over.
- *compacted*: some row of a prompt lies before a model's own first token, or reads another token
  than the base. The model gets a batch of its own, of the requests and rows that it has, ordered
  as vLLM orders a batch, and its hidden states are put back in the scheduler's order after.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from vllm.triton_utils import tl, triton
from vllm.utils.math_utils import round_up
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backends.utils import PAD_SLOT_ID
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.buffer_utils import UvaBackedTensor, _load_ptr
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.utils import AttentionGroup

from proxy_vllm.config import ROLES
from proxy_vllm.own_prompts.prompts import OwnPrompts

# vLLM's own preparation of attention metadata, all but the batch bound:
# (batch, block tables, slot mappings [G, N], attention groups) -> metadata of each layer.
PrepareAttention = Callable[..., dict[str, Any]]


@dataclass
class MemberInputs:
    """What one model runs on in one step."""

    input_ids: torch.Tensor  # [N] int32
    positions: torch.Tensor  # [N] int64
    slots: torch.Tensor  # [G, N] int64, a row for each of vLLM's KV-cache groups
    layers: list[list[str]]  # the model's layers of each group
    # Rows of the scheduler's batch, in the model's order; None if that is the same.
    rows: torch.Tensor | None = None  # [T_m] int64
    absent: bool = False  # no row of this step is the model's

    def slots_of_layers(self) -> dict[str, torch.Tensor]:
        """Where each layer writes its rows' keys and values, ``[N]``."""
        return {
            name: slots
            for layers, slots in zip(self.layers, self.slots, strict=True)
            for name in layers
        }


@dataclass
class Step:
    """The inputs of one step, for the batch that they were made from."""

    batch: InputBatch | None
    members: tuple[MemberInputs, ...]


@triton.jit(do_not_specialize=["num_reqs"])  # else it compiles anew while requests wait
def _shift_kernel(
    pads_ptr,  # [3, max_num_reqs] int32, by request slot
    pads_stride,
    idx_mapping_ptr,  # [num_reqs] batch row -> request slot
    num_reqs,
    query_start_loc_ptr,  # [num_rows + 1]
    input_ids_ptr,  # [N] int32
    positions_ptr,  # [N] int64
    seq_lens_ptr,  # [num_rows] int32
    slots_ptr,  # [G, N] int64
    slots_stride,
    block_table_ptrs,  # [G] -> [max_num_reqs, max_num_blocks] int32, by request slot
    block_table_strides,  # [G]
    kv_blocks_ptr,  # [G] tokens of a block
    has_slots_ptr,  # [G] whether layers of the group write to slots
    out_ids_ptr,  # [3, max_num_tokens]
    out_positions_ptr,  # [3, max_num_tokens]
    out_slots_ptr,  # [3, G, max_num_tokens]
    out_tokens_stride,
    out_seq_lens_ptr,  # [3, max_num_reqs]
    out_seq_lens_stride,
    PAD_SLOT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    role = tl.program_id(0)
    row = tl.program_id(1)
    group = tl.program_id(2)
    num_rows = tl.num_programs(1) - 1
    slots_ptr += group * slots_stride
    out_slots_ptr += (role * tl.num_programs(2) + group) * out_tokens_stride
    out_seq_lens_ptr += role * out_seq_lens_stride
    start = tl.load(query_start_loc_ptr + row)
    if row == num_rows:  # what a graph reads past the batch
        for i in range(start, out_tokens_stride, BLOCK):
            index = i + tl.arange(0, BLOCK)
            tl.store(out_slots_ptr + index, PAD_SLOT, mask=index < out_tokens_stride)
        for i in range(num_rows, out_seq_lens_stride, BLOCK):
            index = i + tl.arange(0, BLOCK)
            tl.store(out_seq_lens_ptr + index, 0, mask=index < out_seq_lens_stride)
        return
    slot = tl.load(idx_mapping_ptr + row, mask=row < num_reqs, other=0)
    pad = tl.load(pads_ptr + role * pads_stride + slot, mask=row < num_reqs, other=0)
    tl.store(out_seq_lens_ptr + row, tl.load(seq_lens_ptr + row) - pad)
    block_table_ptr = _load_ptr(block_table_ptrs + group, tl.int32)
    block_table_ptr += slot * tl.load(block_table_strides + group)
    kv_block = tl.load(kv_blocks_ptr + group)
    has_slots = tl.load(has_slots_ptr + group)
    end = tl.load(query_start_loc_ptr + row + 1)
    for i in range(start, end, BLOCK):
        index = i + tl.arange(0, BLOCK)
        mask = index < end
        tokens = tl.load(input_ids_ptr + index, mask=mask)
        position = tl.load(positions_ptr + index, mask=mask, other=0) - pad
        own = tl.load(
            block_table_ptr + position // kv_block, mask=mask & has_slots & (pad > 0), other=0
        )
        own = tl.where(has_slots, own.to(tl.int64) * kv_block + position % kv_block, PAD_SLOT)
        common = tl.load(slots_ptr + index, mask=mask)
        out = role * out_tokens_stride + index
        tl.store(out_ids_ptr + out, tokens, mask=mask)
        tl.store(out_positions_ptr + out, position, mask=mask)
        tl.store(out_slots_ptr + index, tl.where(pad > 0, own, common), mask=mask)


class OwnPromptState:
    """The prompts of running requests, and each model's persistent input buffers."""

    def __init__(self, max_num_reqs: int, max_num_tokens: int, device: torch.device) -> None:
        self.device = device
        # By request slot; the source of truth is on the CPU.
        self.pads = UvaBackedTensor((len(ROLES), max_num_reqs), dtype=torch.int32)
        self.no_pads = torch.zeros(len(ROLES), max_num_reqs, dtype=torch.int32, device=device)
        self.prompts: dict[str, OwnPrompts] = {}

        def buffer(size: int, dtype: torch.dtype, fill: int = 0) -> torch.Tensor:
            # Compiled code takes its inputs to be aligned, so every model's row must be.
            return torch.full((len(ROLES), round_up(size, 16)), fill, dtype=dtype, device=device)

        self.input_ids = buffer(max_num_tokens, torch.int32)
        self.positions = buffer(max_num_tokens, torch.int64)
        self.seq_lens = buffer(max_num_reqs, torch.int32)

    def bind(self, kv_cache_config: KVCacheConfig, block_tables: BlockTables) -> None:
        """Learn the KV cache's layout, when vLLM has made it.

        Of several block tables none may lose blocks by the scheduler's count, which a model can be
        behind: local attention is kept for every token then, and a state has one block.
        """
        groups = kv_cache_config.kv_cache_groups
        self.block_tables = block_tables
        self.layers = {
            role: [[name for name in g.layer_names if name.startswith(f"{role}.")] for g in groups]
            for role in ROLES
        }
        shape = (len(ROLES), len(groups), self.positions.shape[1])
        self.slots = torch.full(shape, PAD_SLOT_ID, dtype=torch.int64, device=self.device)

    def add_request(self, req_index: int, req_id: str, own: OwnPrompts | None) -> None:
        self.pads.np[:, req_index] = 0 if own is None else own.pads
        if own is not None:
            self.prompts[req_id] = own

    def remove_request(self, req_id: str) -> None:
        self.prompts.pop(req_id, None)

    def any_in(self, req_ids: list[str]) -> bool:
        return bool(self.prompts) and not self.prompts.keys().isdisjoint(req_ids)

    def any_prefilling(self, req_ids: list[str], num_computed: np.ndarray) -> bool:
        """Whether a request of the batch has rows left that differ between its models."""
        return bool(self.prompts) and any(
            own is not None and computed < own.length
            for own, computed in zip(map(self.prompts.get, req_ids), num_computed, strict=True)
        )

    def static_inputs(self, num_tokens: int) -> tuple[MemberInputs, ...]:
        """The persistent buffers, as CUDA graphs read them."""
        return tuple(
            MemberInputs(
                self.input_ids[m, :num_tokens],
                self.positions[m, :num_tokens],
                self.slots[m, :, :num_tokens],
                self.layers[role],
            )
            for m, role in enumerate(ROLES)
        )

    def shift(
        self,
        batch: InputBatch,
        block_tables: tuple[torch.Tensor, ...],
        slot_mappings: torch.Tensor,  # [G, N]
        attn_groups: list[list[AttentionGroup]],
        prepare: PrepareAttention,
        for_capture: bool,
    ) -> tuple[Step, dict[str, Any]]:
        """Inputs and metadata of a batch all of whose rows every model has.

        Args:
            slot_mappings: the scheduler's.
            for_capture: of a graph, which will read the tensors of its metadata in every replay.
        """
        own = self.any_in(batch.req_ids)
        pads = self.pads.gpu if own else self.no_pads
        tables = self.block_tables
        _shift_kernel[(len(ROLES), batch.num_reqs_after_padding + 1, len(slot_mappings))](
            pads,
            pads.stride(0),
            batch.idx_mapping,
            batch.num_reqs,
            batch.query_start_loc,
            batch.input_ids,
            batch.positions,
            batch.seq_lens,
            slot_mappings,
            slot_mappings.stride(0),
            tables.block_table_ptrs,
            tables.block_table_strides,
            tables.block_sizes_tensor,
            tables.slot_mapping_enabled,
            self.input_ids,
            self.positions,
            self.slots,
            self.slots.stride(1),
            self.seq_lens,
            self.seq_lens.stride(0),
            PAD_SLOT=PAD_SLOT_ID,
            BLOCK=256,
        )
        size = batch.num_tokens_after_padding
        members = self.static_inputs(size)
        if not own and not for_capture:
            # The same values for all: graphs take them from our buffers and the builders' own.
            return Step(batch, members), prepare(batch, block_tables, slot_mappings, attn_groups)
        metadata: dict[str, Any] = {}
        for m, (role, inputs) in enumerate(zip(ROLES, members, strict=True)):
            if not any(inputs.layers):
                continue  # the role is the base itself
            fields: dict[str, Any] = {}
            if own:
                behind = self.pads.np[m, batch.idx_mapping_np]
                bound = batch.seq_lens_cpu_upper_bound.numpy().copy()
                bound[: batch.num_reqs] -= behind
                fields = {
                    "seq_lens_cpu_upper_bound": torch.from_numpy(bound),
                    "num_computed_tokens_np": batch.num_computed_tokens_np - behind,
                }
            mine = replace(
                batch,
                positions=inputs.positions,
                input_ids=inputs.input_ids,
                seq_lens=self.seq_lens[m, : batch.num_reqs_after_padding],
                **fields,
            )
            metadata |= prepare(mine, block_tables, inputs.slots, of_role(attn_groups, role))
        return Step(batch, members), metadata

    def compact(
        self,
        batch: InputBatch,
        block_tables: tuple[torch.Tensor, ...],
        attn_groups: list[list[AttentionGroup]],
        prepare: PrepareAttention,
    ) -> tuple[Step, dict[str, Any]]:
        """Inputs and metadata of a batch with rows that some model has not, or reads otherwise."""
        members = self.static_inputs(batch.num_tokens_after_padding)
        metadata: dict[str, Any] = {}
        for m, (role, inputs) in enumerate(zip(ROLES, members, strict=True)):
            if not any(inputs.layers):
                continue  # the role is the base itself
            mine, order = self._batch_of(m, role, batch, inputs)
            tables = tuple(table[order] for table in block_tables)
            metadata |= prepare(mine, tables, inputs.slots, of_role(attn_groups, role))
        return Step(batch, members), metadata

    def _batch_of(
        self, m: int, role: str, batch: InputBatch, inputs: MemberInputs
    ) -> tuple[InputBatch, torch.Tensor]:
        """One model's own batch, and the batch rows of its requests.

        A model that has no row at all gets one that writes nothing, in case it must run.
        """
        scheduled = batch.num_scheduled_tokens
        pads = self.pads.np[m, batch.idx_mapping_np]
        seq_lens = batch.num_computed_tokens_np + scheduled - pads
        counts = np.clip(seq_lens, 0, scheduled)
        inputs.absent = not counts.any()
        if inputs.absent:
            counts[0] = seq_lens[0] = 1
        order = np.flatnonzero(counts)
        # As vLLM orders a batch: shortest queries first, and of one length those that go on, since
        # layers with states take a lone first token for a prompt and what follows it too.
        starts = seq_lens - counts
        order = order[np.lexsort((starts[order] == 0, counts[order]))]
        seq_lens, counts, starts = seq_lens[order], counts[order], starts[order]
        total = int(counts.sum())
        query_start_loc: np.ndarray = np.zeros(len(order) + 1, dtype=np.int32)
        np.cumsum(counts, out=query_start_loc[1:])
        offsets = np.arange(total) - np.repeat(query_start_loc[:-1], counts)
        first_rows = batch.query_start_loc_np[order + 1] - counts
        rows = offsets + np.repeat(first_rows, counts)

        own_ids: np.ndarray = np.full(total, -1, dtype=np.int32)
        req_ids = [batch.req_ids[i] for i in order]
        for i, own in enumerate(map(self.prompts.get, req_ids)):
            if own is not None and role != "base":
                ids = own.of_role(role)[starts[i] : seq_lens[i]]
                own_ids[query_start_loc[i] : query_start_loc[i] + len(ids)] = ids

        def device(array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
            return async_tensor_h2d(array, device=self.device, dtype=dtype)

        rows_gpu = device(rows, torch.int64)
        order_gpu = device(order, torch.int64)
        query_start_loc_gpu = device(query_start_loc, torch.int32)
        own_gpu = device(own_ids, torch.int32)
        inputs.input_ids[:total] = torch.where(own_gpu >= 0, own_gpu, batch.input_ids[rows_gpu])
        inputs.input_ids[total:] = 0
        inputs.positions[:total] = device(offsets + np.repeat(starts, counts), torch.int64)
        inputs.positions[total:] = 0
        idx_mapping = batch.idx_mapping[order_gpu]
        self.block_tables.compute_slot_mappings(
            idx_mapping,
            query_start_loc_gpu,
            inputs.positions,
            num_tokens_padded=inputs.slots.shape[1],
            out=self.slots[m],
        )
        if inputs.absent:
            inputs.slots.fill_(PAD_SLOT_ID)
        if total < batch.num_tokens or not np.array_equal(rows, np.arange(total)):
            inputs.rows = rows_gpu
        prefill_lens = np.maximum(batch.prefill_len_np[order] - pads[order], 0)
        mine = replace(
            batch,
            req_ids=req_ids,
            num_reqs=len(order),
            num_reqs_after_padding=len(order),
            idx_mapping=idx_mapping,
            idx_mapping_np=batch.idx_mapping_np[order],
            num_scheduled_tokens=counts.astype(np.int32),
            num_tokens=total,
            query_start_loc=query_start_loc_gpu,
            query_start_loc_np=query_start_loc,
            seq_lens=device(seq_lens, torch.int32),
            seq_lens_cpu_upper_bound=torch.from_numpy(seq_lens.astype(np.int32)),
            num_computed_tokens_np=starts,
            prefill_len_np=prefill_lens,
            num_computed_prefill_tokens_np=np.minimum(starts, prefill_lens),
            is_prefilling_np=batch.is_prefilling_np[order],
            has_prefill=bool(batch.is_prefilling_np[order].any()),
            prefill_runs_as_decode_np=None,
            input_ids=inputs.input_ids,
            positions=inputs.positions,
        )
        return mine, order_gpu


def of_role(attn_groups: list[list[AttentionGroup]], role: str) -> list[list[AttentionGroup]]:
    """The attention groups of one model; none mixes models (see members.py)."""
    return [
        [group for group in groups if group.layer_names[0].startswith(f"{role}.")]
        for groups in attn_groups
    ]
