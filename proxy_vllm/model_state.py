"""Per-request state on Model Runner V2: each request's alpha, in device buffers."""

from typing import Any

import torch
import torch.nn as nn
from vllm.config import VllmConfig
from vllm.triton_utils import tl, triton
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.worker.gpu.buffer_utils import UvaBackedTensor
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.mm.encoder_cache import EncoderCache
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.states import RequestState

from proxy_vllm.request import worker_alpha


@triton.jit
def _expand_alpha_kernel(
    alpha_ptr,  # [max_num_reqs] float32, by request slot
    idx_mapping_ptr,  # [num_reqs] batch row -> request slot
    query_start_loc_ptr,  # [num_reqs + 1]
    out_ptr,  # [num_tokens] float32
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    alpha = tl.load(alpha_ptr + tl.load(idx_mapping_ptr + row))
    start = tl.load(query_start_loc_ptr + row)
    end = tl.load(query_start_loc_ptr + row + 1)
    for offset in range(start, end, BLOCK):
        index = offset + tl.arange(0, BLOCK)
        tl.store(out_ptr + index, alpha, mask=index < end)


class ProxyModelState(DefaultModelState):
    """Adds alpha to vLLM's state of a decoder-only model."""

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
        # One address for every step: CUDA graphs replay over it.
        self.token_alpha = torch.full(
            (self.max_num_tokens,), self.proxy_config.alpha, dtype=torch.float32, device=device
        )

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        super().add_request(req_index, new_req_data)
        self.alpha.np[req_index] = worker_alpha(self.proxy_config, new_req_data.sampling_params)

    def apply_staged_writes(self) -> None:
        super().apply_staged_writes()
        self.alpha.copy_to_uva()

    def prepare_inputs(
        self, input_batch: InputBatch, req_states: RequestState
    ) -> dict[str, torch.Tensor | None]:
        inputs = super().prepare_inputs(input_batch, req_states)
        _expand_alpha_kernel[(input_batch.num_reqs,)](
            self.alpha.gpu,
            input_batch.idx_mapping,
            input_batch.query_start_loc,
            self.token_alpha,
            BLOCK=256,
        )
        inputs["alpha"] = self.token_alpha[: input_batch.num_tokens_after_padding]
        return inputs

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        inputs = super().prepare_dummy_inputs(num_reqs, num_tokens)
        inputs["alpha"] = self.token_alpha[:num_tokens]
        return inputs

    def custom_sampler(self, sampler: Any) -> tuple[Any, Any] | None:
        """Model Runner V2's hook: our sampler, and vLLM's draft verification on top of it."""
        from proxy_vllm.sampler import ProxySampler

        if self.vllm_config.watermark_config is not None:
            return None  # vLLM's watermarking sampler draws the token itself
        heads = self.model.sharded_heads
        ours = ProxySampler(sampler, self.alpha, heads.exchange if heads is not None else None)
        speculative = self.vllm_config.speculative_config
        if speculative is None:
            return ours, None
        from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler

        return ours, RejectionSampler(ours, speculative, self.device)
