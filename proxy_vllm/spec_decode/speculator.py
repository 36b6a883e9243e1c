"""The draft loop on Model Runner V2: the composite's expert, its layers and its KV cache."""

from typing import Any

import numpy as np
import torch
import torch.nn as nn
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import BatchDescriptor, set_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.triton_utils import tl, triton
from vllm.v1.worker.gpu.attn_utils import build_slot_mappings_by_layer
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor
from vllm.v1.worker.gpu.dp_utils import DPSyncState, dispatch_cg_and_sync_dp
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample
from vllm.v1.worker.gpu.spec_decode.speculator import DraftModelSpeculator
from vllm.v1.worker.gpu.spec_decode.target_dependent_ar.cudagraph_utils import (
    SpeculatorBatchDescriptor,
    SpeculatorCudaGraphManager,
)

from proxy_vllm.config import ROLES, ProxyConfig


@triton.jit
def _start_kernel(
    last_sampled_ptr,  # [slots]
    idx_mapping_ptr,  # [B] batch row -> request slot
    seq_lens_ptr,  # [B] tokens of the step that was verified, rejected ones too
    num_sampled_ptr,  # [B]
    num_rejected_ptr,  # [B]
    pads_ptr,  # [slots] how far the expert's own prompt is behind, or None
    input_ids_ptr,
    positions_ptr,
    sample_positions_ptr,
    draft_seq_lens_ptr,
    query_start_loc_ptr,
    draft_idx_mapping_ptr,
    max_model_len,
    max_num_reqs,
    vocab_size,  # of the expert
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    num_reqs = tl.num_programs(0) - 1
    if row == num_reqs:
        # Rows that pad a CUDA graph have no token, no slot and no keys to read.
        for start in range(0, max_num_reqs + 1, BLOCK):
            index = start + tl.arange(0, BLOCK)
            query_start = tl.where(index < num_reqs, index, num_reqs)
            tl.store(query_start_loc_ptr + index, query_start, mask=index <= max_num_reqs)
            padding = (index >= num_reqs) & (index < max_num_reqs)
            tl.store(draft_seq_lens_ptr + index, 0, mask=padding)
            tl.store(draft_idx_mapping_ptr + index, -1, mask=padding)
        return
    slot = tl.load(idx_mapping_ptr + row)
    # The token drawn last stands behind those that were verified.
    sample_position = tl.load(seq_lens_ptr + row) - tl.load(num_rejected_ptr + row)
    # A prompt that has not been read to its end has no such token.
    drafts = (tl.load(num_sampled_ptr + row) > 0) & (sample_position < max_model_len)
    position = sample_position
    if pads_ptr is not None:
        position -= tl.load(pads_ptr + slot)
    position = tl.minimum(tl.maximum(position, 0), max_model_len - 1)
    token = tl.load(last_sampled_ptr + slot)
    tl.store(input_ids_ptr + row, tl.where((token >= 0) & (token < vocab_size), token, 0))
    tl.store(positions_ptr + row, position)
    tl.store(sample_positions_ptr + row, sample_position)
    tl.store(draft_seq_lens_ptr + row, position + 1)
    tl.store(draft_idx_mapping_ptr + row, tl.where(drafts, slot, -1))


@triton.jit
def _advance_kernel(
    tokens_ptr,  # [B]
    draft_tokens_ptr,
    draft_tokens_stride,
    step,
    input_ids_ptr,
    positions_ptr,
    sample_positions_ptr,
    seq_lens_ptr,
    idx_mapping_ptr,
    max_model_len,
    vocab_size,  # of the expert
):
    row = tl.program_id(0)
    token = tl.load(tokens_ptr + row)
    tl.store(draft_tokens_ptr + row * draft_tokens_stride + step, token)
    tl.store(input_ids_ptr + row, tl.where(token < vocab_size, token, 0))
    sample_position = tl.load(sample_positions_ptr + row) + 1
    tl.store(sample_positions_ptr + row, sample_position)
    position = tl.minimum(tl.load(positions_ptr + row) + 1, max_model_len - 1)
    tl.store(positions_ptr + row, position)
    # Rows without a slot stay where they are: a graph's padding reads no keys.
    slot = tl.load(idx_mapping_ptr + row)
    seq_len = tl.load(seq_lens_ptr + row)
    tl.store(seq_lens_ptr + row, tl.where(slot >= 0, position + 1, seq_len))
    tl.store(idx_mapping_ptr + row, tl.where(sample_position < max_model_len, slot, -1))


class ExpertSpeculator(DraftModelSpeculator):
    """Drafts K tokens a step with the expert of the composite that verifies them.

    Where the expert is the base itself, the antiexpert drafts in its place.

    Each draft is drawn with the noise that will draw the token itself (request seed, position,
    token id), so that also at a temperature the two agree wherever expert and combination do.
    Penalties, grammars and filters are left to the verification.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        drafter = ProxyConfig.from_vllm_config(vllm_config).drafter
        assert drafter is not None  # `with_same_weights` refuses such engines
        self.drafter = drafter
        self.sample_positions = torch.zeros(self.max_num_reqs, dtype=torch.int64, device=device)
        self.graphs: SpeculatorCudaGraphManager | None = None
        # The runner, where requests have adapters.
        self.adapters: Any = None
        self.model_state: Any = None  # of a run that profiles memory, before there is one

    def load_draft_model(
        self, target_model: nn.Module, target_attn_layer_names: set[str]
    ) -> nn.Module:
        return getattr(target_model, self.drafter)

    def load_model(self, target_model: nn.Module) -> None:
        # vLLM's own method takes the layers that loading a drafter adds; here it adds none.
        layers = get_layers_from_vllm_config(self.vllm_config, AttentionLayerBase)
        self.draft_attn_layer_names = {
            name for name in layers if name.startswith(f"{self.drafter}.")
        }
        self.model = self.load_draft_model(target_model, set(layers))
        # Tokens that the combination can draw.
        self.drawable = target_model.columns.named
        self.vocab_size = target_model.vocab_sizes[self.drafter]

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        whole = (
            cudagraph_mode.decode_mode() == CUDAGraphMode.FULL
            and self.supports_decode_metadata_update
        )
        self.graphs = SpeculatorCudaGraphManager(
            self.vllm_config,
            self.device,
            CUDAGraphMode.FULL_DECODE_ONLY if whole else CUDAGraphMode.NONE,
            decode_query_len=1,
        )

    def capture(self) -> None:
        assert self.graphs is not None
        # What dummy runs left behind might point anywhere.
        self.idx_mapping.zero_()
        if self.adapters is not None:
            # A graph launches the products of as many adapters as are laid out now.
            rows: np.ndarray = np.ones(self.max_num_reqs, dtype=np.int32)
            lora = self.adapters.lora_config
            most = lora.max_loras + 1
            with self.adapters.maybe_select_dummy_loras(lora, rows, num_active_loras=most):
                pass
        if self.speculative_config.uses_dynamic_speculative_decoding():
            # A graph of each number of drafts; vLLM's own way to it leaves out loops of one.
            self.graphs._capture_descs = {
                mode: [
                    SpeculatorBatchDescriptor(**vars(desc), num_speculative_tokens=steps)
                    for desc in descs
                    for steps in range(self.num_speculative_steps, 0, -1)
                ]
                for mode, descs in self.graphs._capture_descs.items()
            }
        self.graphs.capture(
            self._draft,
            self.model_state,
            self.input_buffers,
            self.block_tables,
            self.attn_groups,
            self.kv_cache_config,
            progress_bar_desc="Capturing CUDA graphs of the expert's drafts",
        )

    @torch.inference_mode()
    def propose(
        self,
        input_batch: InputBatch,
        attn_metadata: dict[str, Any] | None,
        slot_mappings: dict[str, torch.Tensor] | None,
        last_hidden_states: torch.Tensor,
        aux_hidden_states: list[torch.Tensor] | None,
        num_sampled: torch.Tensor,  # [B]
        num_rejected: torch.Tensor,  # [B]
        last_sampled: torch.Tensor,  # [slots]
        next_prefill_tokens: torch.Tensor,
        temperature: torch.Tensor,  # [slots]
        seeds: torch.Tensor,  # [slots]
        dp_sync_state: DPSyncState | None = None,
        dummy_run: bool = False,
        skip_attn_for_dummy_run: bool = False,
        mm_inputs: Any = None,
        is_profile: bool = False,
        num_speculative_tokens: int | None = None,
    ) -> torch.Tensor:  # [B, K] int64
        """Drafts of every row; those of rows that have none to give are of no meaning."""
        num_reqs = input_batch.num_reqs
        steps = self.num_speculative_steps
        if num_speculative_tokens is not None:
            steps = num_speculative_tokens
        if steps == 0 or (not dummy_run and self._is_base_alone(input_batch)):
            return self.draft_tokens[:num_reqs]
        upper_bound = input_batch.seq_lens_cpu_upper_bound
        self.draft_max_seq_len = min(int(upper_bound[:num_reqs].max()) + steps, self.max_model_len)
        self._start(input_batch, num_sampled, num_rejected, last_sampled, temperature, seeds)
        if self.adapters is not None and not dummy_run:
            self.adapters.set_adapters_of_drafts(input_batch)
        if dummy_run:
            self.idx_mapping.fill_(-1)  # its slots may be those of requests

        sync, num_tokens = None, num_reqs
        if dp_sync_state is not None:
            sync, num_tokens = self._build_uniform_batch_dp_sync(dp_sync_state, num_reqs)
        desc, sync = dispatch_cg_and_sync_dp(
            self.graphs,
            num_reqs,
            num_tokens,
            uniform_token_count=1,
            dp_size=self.dp_size,
            dp_rank=self.dp_rank,
            need_eager=is_profile,
            dp_sync_state=sync,
        )
        if self.graphs is not None:
            desc = self.graphs.specialize_spec_tokens(desc, steps)
        if desc.cg_mode == CUDAGraphMode.FULL:
            for group in (group for groups in self.attn_groups for group in groups):
                table = self.block_tables.input_block_tables[group.kv_cache_group_id]
                group.map_to_kernel_block_table(table)
            assert self.graphs is not None
            self.graphs.run_fullgraph(desc)
            return self.draft_tokens[:num_reqs]

        metadata = slots = None
        if not (dummy_run and skip_attn_for_dummy_run):
            slots = build_slot_mappings_by_layer(
                self.block_tables.slot_mappings[:, : desc.num_tokens], self.kv_cache_config
            )
            metadata = self._attn_metadata(desc, num_reqs, upper_bound, 1)
        self._draft(
            num_reqs,
            desc.num_tokens,
            metadata,
            slots,
            sync.num_tokens_across_dp if sync is not None else None,
            desc.cg_mode,
            steps,
            seq_lens_cpu_upper_bound=upper_bound,
        )
        return self.draft_tokens[:num_reqs]

    def _is_base_alone(self, input_batch: InputBatch) -> bool:
        """Whether every request has alpha 0: such requests draft nothing (see scheduler.py)."""
        # Engines that run in step must all draft, or none.
        return self.dp_size == 1 and not self.model_state.alpha.np[input_batch.idx_mapping_np].any()

    def _start(
        self,
        input_batch: InputBatch,
        num_sampled: torch.Tensor,
        num_rejected: torch.Tensor,
        last_sampled: torch.Tensor,
        temperature: torch.Tensor,
        seeds: torch.Tensor,
    ) -> None:
        """Write the first forward's inputs where a graph reads them."""
        self.temperature.copy_(temperature)
        self.seeds.copy_(seeds)
        own = getattr(self.model_state, "own", None)
        buffers = self.input_buffers
        _start_kernel[(input_batch.num_reqs + 1,)](
            last_sampled,
            input_batch.idx_mapping,
            input_batch.seq_lens,
            num_sampled,
            num_rejected,
            own.pads.gpu[ROLES.index(self.drafter)] if own is not None else None,
            buffers.input_ids,
            buffers.positions,
            self.sample_positions,
            buffers.seq_lens,
            buffers.query_start_loc,
            self.idx_mapping,
            self.max_model_len,
            self.max_num_reqs,
            self.vocab_size,
            BLOCK=1024,
        )

    def _attn_metadata(
        self,
        desc: BatchExecutionDescriptor,
        num_reqs: int,
        seq_lens_cpu_upper_bound: torch.Tensor,
        step: int,
    ) -> dict[str, Any] | None:
        return self._build_uniform_attn_metadata(
            batch_desc=desc,
            num_reqs=num_reqs,
            num_query_per_req=1,
            seq_lens_cpu_upper_bound=seq_lens_cpu_upper_bound,
            step=step,
        )

    def _draft(
        self,
        num_reqs: int,
        num_tokens_padded: int,
        attn_metadata: dict[str, Any] | None,
        slot_mappings: dict[str, torch.Tensor] | None,
        num_tokens_across_dp: torch.Tensor | None,
        cudagraph_runtime_mode: CUDAGraphMode,
        num_speculative_steps: int,
        seq_lens_cpu_upper_bound: torch.Tensor | None = None,
    ) -> None:
        """The loop over persistent buffers, which one CUDA graph can hold.

        Attention metadata is brought up to date in place where the backend can do so, and made
        anew for each step otherwise, from ``seq_lens_cpu_upper_bound`` and never within a graph.
        """
        buffers = self.input_buffers
        positions = buffers.positions[:num_reqs]
        idx_mapping = self.idx_mapping[:num_reqs]
        for step in range(num_speculative_steps):
            if attn_metadata is not None:
                self.block_tables.compute_slot_mappings(
                    idx_mapping,
                    buffers.query_start_loc[: num_reqs + 1],
                    positions,
                    num_tokens_padded,
                )
                if self.supports_decode_metadata_update:
                    self._update_draft_decode_metadata(attn_metadata, num_reqs)
                elif step:
                    assert seq_lens_cpu_upper_bound is not None
                    desc = BatchExecutionDescriptor(
                        cg_mode=CUDAGraphMode.NONE,
                        num_tokens=num_tokens_padded,
                        num_reqs=num_reqs,
                        uniform_token_count=1,
                    )
                    attn_metadata = self._attn_metadata(
                        desc, num_reqs, seq_lens_cpu_upper_bound, step + 1
                    )
            self._prepare_eplb_forward(num_reqs)
            with set_forward_context(
                attn_metadata,
                self.vllm_config,
                num_tokens=num_tokens_padded,
                num_tokens_across_dp=num_tokens_across_dp,
                cudagraph_runtime_mode=cudagraph_runtime_mode,
                slot_mapping=slot_mappings,
                batch_descriptor=BatchDescriptor(num_tokens=num_tokens_padded),
            ):
                hidden = self.model(
                    buffers.input_ids[:num_tokens_padded], buffers.positions[:num_tokens_padded]
                )
            logits = self.model.compute_logits(hidden[:num_reqs])[:, : self.drawable]
            tokens = gumbel_sample(
                logits,
                idx_mapping,
                self.temperature,
                self.seeds,
                self.sample_positions[:num_reqs],
                apply_temperature=True,
                is_drafting=False,  # which would be noise of another kind
                use_fp64=self.use_fp64_gumbel,
            )
            _advance_kernel[(num_reqs,)](
                tokens,
                self.draft_tokens,
                self.draft_tokens.stride(0),
                step,
                buffers.input_ids,
                buffers.positions,
                self.sample_positions,
                buffers.seq_lens,
                self.idx_mapping,
                self.max_model_len,
                self.vocab_size,
            )
