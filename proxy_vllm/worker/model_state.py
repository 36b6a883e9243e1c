"""Per-request state on Model Runner V2: each request's alpha and prompts, in device buffers."""

from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.triton_utils import tl, triton
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.buffer_utils import UvaBackedTensor
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.mm.encoder_cache import EncoderCache
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.model_states.mamba_hybrid import MambaHybridModelState
from vllm.v1.worker.gpu.states import RequestState
from vllm.v1.worker.utils import AttentionGroup

from proxy_vllm.own_prompts.inputs import OwnPromptState, Step
from proxy_vllm.own_prompts.prompts import RESOLVED_KEY, OwnPrompts, unsupported_reason


@triton.jit
def _expand_steering_kernel(
    alpha_ptr,  # [max_num_reqs] float32, by request slot
    plausibility_ptr,  # [2, max_num_reqs] float32
    plausibility_stride,
    idx_mapping_ptr,  # [num_reqs] batch row -> request slot
    query_start_loc_ptr,  # [num_reqs + 1]
    out_ptr,  # [num_tokens] float32
    out_plausibility_ptr,  # [2, num_tokens] float32
    out_plausibility_stride,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    slot = tl.load(idx_mapping_ptr + row)
    alpha = tl.load(alpha_ptr + slot)
    log_beta = tl.load(plausibility_ptr + slot)
    drop = tl.load(plausibility_ptr + plausibility_stride + slot)
    start = tl.load(query_start_loc_ptr + row)
    end = tl.load(query_start_loc_ptr + row + 1)
    for offset in range(start, end, BLOCK):
        index = offset + tl.arange(0, BLOCK)
        tl.store(out_ptr + index, alpha, mask=index < end)
        tl.store(out_plausibility_ptr + index, log_beta, mask=index < end)
        tl.store(out_plausibility_ptr + out_plausibility_stride + index, drop, mask=index < end)


class _ProxyState(DefaultModelState):
    """Adds alpha and own prompts to vLLM's state of a decoder-only model."""

    supports_prompt_embeds = False

    def __init__(
        self,
        vllm_config: VllmConfig,
        model: nn.Module,
        encoder_cache: EncoderCache | None,
        device: torch.device,
    ) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        self.proxy_config = model.proxy_config
        self.alpha = UvaBackedTensor(self.max_num_reqs, dtype=torch.float32)
        self.alpha.np[:] = self.proxy_config.alpha
        self.alpha.copy_to_uva()
        self.plausibility = UvaBackedTensor((2, self.max_num_reqs), dtype=torch.float32)
        common = torch.tensor([self.proxy_config.plausibility_of(None)]).T
        self.plausibility.np[:] = common.numpy()
        self.plausibility.copy_to_uva()
        # One address for every step: CUDA graphs replay over it.
        self.token_alpha = torch.full(
            (self.max_num_tokens,), self.proxy_config.alpha, dtype=torch.float32, device=device
        )
        self.token_plausibility = common.repeat(1, self.max_num_tokens).to(device)
        # None: this engine cannot run own prompts, and everything is vLLM's own.
        self.own: OwnPromptState | None = None
        if unsupported_reason(vllm_config) is None:
            self.own = OwnPromptState(self.max_num_reqs, self.max_num_tokens, device)
        self.step: Step | None = None

    def initialize_kv_cache(
        self, kv_cache_config: KVCacheConfig, block_tables: BlockTables
    ) -> None:
        super().initialize_kv_cache(kv_cache_config, block_tables)
        if self.own is not None:
            self.own.bind(kv_cache_config, block_tables)

    def get_additional_cg_support(self) -> tuple[AttentionCGSupport, str | None]:
        """A batch with a prefill must not run in one graph: its rows may need compacting."""
        support, name = super().get_additional_cg_support()
        if self.own is not None and support.value > AttentionCGSupport.UNIFORM_BATCH.value:
            return AttentionCGSupport.UNIFORM_BATCH, "a prompt of each model's own"
        return support, name

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        super().add_request(req_index, new_req_data)
        params = new_req_data.sampling_params
        self.alpha.np[req_index] = self.proxy_config.worker_alpha(params, new_req_data.lora_request)
        self.plausibility.np[:, req_index] = self.proxy_config.plausibility_of(params)
        if self.own is not None:
            data = (params.extra_args or {}).get(RESOLVED_KEY) if params is not None else None
            prompt = new_req_data.prompt_token_ids
            own = OwnPrompts.from_worker(prompt, data) if data is not None else None
            self.own.add_request(req_index, new_req_data.req_id, own)

    def remove_request(self, req_id: str) -> None:
        super().remove_request(req_id)
        if self.own is not None:
            self.own.remove_request(req_id)

    def apply_staged_writes(self) -> None:
        super().apply_staged_writes()
        self.alpha.copy_to_uva()
        self.plausibility.copy_to_uva()
        if self.own is not None:
            self.own.pads.copy_to_uva()

    def prepare_attn(
        self,
        input_batch: InputBatch,
        cudagraph_mode: CUDAGraphMode,
        block_tables: tuple[torch.Tensor, ...],
        slot_mappings: torch.Tensor,
        attn_groups: list[list[AttentionGroup]],
        kv_cache_config: KVCacheConfig,
        for_capture: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Attention metadata; where prompts differ, made once a model from that model's batch."""

        def prepare(batch, tables, slots, groups) -> dict[str, Any]:
            return vllm_prepare(
                batch, cudagraph_mode, tables, slots, groups, kv_cache_config, for_capture, **kwargs
            )

        vllm_prepare = super().prepare_attn
        own, self.step = self.own, None
        # Graphs were captured over each model's buffers, so those must be filled in any case.
        graphs = for_capture or cudagraph_mode != CUDAGraphMode.NONE
        roles = {group.layer_names[0].split(".")[0] for groups in attn_groups for group in groups}
        # The batch of one model alone, as its drafts are, is that model's own already.
        alone = len(roles) == 1
        if own is None or alone or not (graphs or own.any_in(input_batch.req_ids)):
            return prepare(input_batch, block_tables, slot_mappings, attn_groups)
        if own.any_prefilling(input_batch.req_ids, input_batch.num_computed_tokens_np):
            assert cudagraph_mode != CUDAGraphMode.FULL
            make = own.compact
        else:
            make = partial(own.shift, slot_mappings=slot_mappings, for_capture=for_capture)
        self.step, metadata = make(
            input_batch, block_tables, attn_groups=attn_groups, prepare=prepare
        )
        return metadata

    def prepare_inputs(
        self, input_batch: InputBatch, req_states: RequestState
    ) -> dict[str, torch.Tensor | None]:
        inputs = super().prepare_inputs(input_batch, req_states)
        self.model.some_alone = bool(np.isinf(self.alpha.np[input_batch.idx_mapping_np]).any())
        _expand_steering_kernel[(input_batch.num_reqs,)](
            self.alpha.gpu,
            self.plausibility.gpu,
            self.plausibility.gpu.stride(0),
            input_batch.idx_mapping,
            input_batch.query_start_loc,
            self.token_alpha,
            self.token_plausibility,
            self.token_plausibility.stride(0),
            BLOCK=256,
        )
        inputs |= self._steering(input_batch.num_tokens_after_padding)
        if self.step is not None and self.step.batch is input_batch:
            inputs["members"] = self.step.members  # type: ignore[assignment]
        return inputs

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        inputs = super().prepare_dummy_inputs(num_reqs, num_tokens)
        inputs |= self._steering(num_tokens)
        if self.own is not None:
            inputs["members"] = self.own.static_inputs(num_tokens)
        return inputs

    def _steering(self, num_tokens: int) -> dict[str, torch.Tensor]:
        """What the composite's forward takes of each token's request, at the same addresses."""
        return {
            "alpha": self.token_alpha[:num_tokens],
            "plausibility": self.token_plausibility[:, :num_tokens],
        }

    def custom_sampler(self, sampler: Any) -> tuple[Any, Any] | None:
        """Model Runner V2's hook: our sampler, and draft verification on top of it."""
        from proxy_vllm.worker.sampler import ProxySampler

        if self.vllm_config.watermark_config is not None:
            return None  # vLLM's watermarking sampler draws the token itself
        heads = self.model.sharded_heads
        exchange = heads.exchange if heads is not None else None
        ours = ProxySampler(sampler, self.device, self.proxy_config, exchange)
        speculative = self.vllm_config.speculative_config
        if speculative is None:
            return ours, None
        if speculative.rejection_sample_method != "standard":
            from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler

            return ours, RejectionSampler(ours, speculative, self.device)
        from proxy_vllm.spec_decode.verification import DraftVerifier

        return ours, DraftVerifier(ours, speculative.num_speculative_tokens)


class ProxyModelState(_ProxyState):
    """The state of three models with attention alone."""


class ProxyHybridModelState(_ProxyState, MambaHybridModelState):
    """The state where some model has layers with states, which vLLM copies from block to block."""
