"""Model Runner V2 for proxy-tuned models: sampling straight from the three members' logits."""

from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.distributed.parallel_state import graph_capture
from vllm.logger import init_logger
from vllm.lora.request import LoRARequest
from vllm.utils.gc_utils import freeze_gc_for_cudagraph_capture
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.worker.gpu.buffer_utils import set_default_max_concurrency
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_runner import BatchReqState, GPUModelRunner
from vllm.v1.worker.gpu.sample.output import SamplerOutput
from vllm.v1.worker.gpu.structured_outputs import grammar_invalid_drafts

from proxy_vllm.adapters.manager import AdapterRunner
from proxy_vllm.composite.heads import MemberLogits
from proxy_vllm.config import ProxyConfig
from proxy_vllm.explain.columns import attach
from proxy_vllm.explain.scores import member_scores
from proxy_vllm.kernels.combine_sample import batch_kinds
from proxy_vllm.kernels.fused_head import head_kinds
from proxy_vllm.kernels.row_parameters import FILTERS, PLAUSIBILITY, RowParameters, Steering
from proxy_vllm.spec_decode.speculator import ExpertSpeculator
from proxy_vllm.spec_decode.verification import DraftVerifier
from proxy_vllm.worker.changed_tokens import ChangedTokens
from proxy_vllm.worker.sampler import (
    ProxySampler,
    logit_rows,
    merge,
    merge_logprobs,
    select_requests,
)
from proxy_vllm.worker.sampler_graphs import Record, SamplerGraphs, cuda_graph_recorder

logger = init_logger(f"vllm.{__name__}")


class ProxyModelRunner(AdapterRunner, GPUModelRunner):
    """vLLM's runner, with the fused path wherever the sampler covers a row (see sampler.py)."""

    speculator: Any
    sampler_graphs: SamplerGraphs | None = None

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        proxy = ProxyConfig.from_vllm_config(vllm_config)
        self.changed_tokens = ChangedTokens(proxy.changed_tokens_every, device)
        if self.speculator is not None:
            # vLLM has one buffer of a request's parameters for each step in flight, and takes a
            # step for done when its tokens are fetched. Drafts are made after that, from the same
            # parameters, so a buffer has to rest for one step more.
            set_default_max_concurrency(vllm_config.max_concurrent_batches + 1)
        if self.speculator is not None and proxy.expert_drafts:
            # In place of vLLM's drafter, which has no weights yet.
            self.speculator = ExpertSpeculator(vllm_config, device)
            if self.lora_config is not None:
                self.speculator.adapters = self

    def set_adapters_of_drafts(self, batch: InputBatch) -> None:
        one_each = np.ones(batch.num_reqs, dtype=np.int32)
        inputs = self.lora_state.make_lora_inputs(batch.req_ids, batch.idx_mapping_np, one_each)
        self._set_active_loras(*inputs)

    def _adapters_of_requests(self) -> list[LoRARequest]:
        return list(self.lora_state.lora_requests.values())

    @torch.inference_mode()
    def warm_up_sampler(self) -> None:
        """Compile the fused path's kernels before requests come.

        vLLM's warm-up does not reach them: its requests ask for log-probabilities and penalties.
        """
        sampler, model = self.sampler, self.model
        if not isinstance(sampler, ProxySampler) or not sampler.fusable or not model.packed_width:
            return
        heads, buffers = model.sharded_heads, sampler.row_buffers
        most = self.max_num_reqs * self.decode_query_len

        def zeros(count: int) -> tuple[list[torch.Tensor], Steering]:
            shape = (count, model.packed_width)
            return model.unpack(torch.zeros(shape, dtype=model.hidden_dtype, device=self.device))

        for count in batch_kinds(most, heads.width if heads else model.vocab_size):
            hidden, steering = zeros(count)
            logits = model.logits_for_sampling(hidden)
            # The other mixes of filters launch some of the same kernels.
            for filters in ((), (PLAUSIBILITY,), ("top_p",), ("top_k", "top_p")):
                sampler.draw(logits, buffers.rows(steering, frozenset(filters)))
            # Chosen rows lie closer together than vLLM's logits, which are padded.
            model.combine(logits, steering)
            model.combine(logits, steering, torch.arange(count, device=self.device))
        if model.fused_heads is not None:
            for count in head_kinds(min(most, model.proxy_config.fused_head_max_batch)):
                hidden, steering = zeros(count)
                self.draw(hidden, buffers.rows(steering, frozenset()))

    @torch.inference_mode()
    def _dummy_sampler_run(self, hidden_states: torch.Tensor) -> None:
        """The most memory that sampling takes, for vLLM's profile: both paths in one batch.

        Every row is drawn with filters, and all but the logits of that is freed; then the rows that
        need their distribution, here all of them, are picked, combined and sampled beside it.
        """
        sampler = self.sampler
        if not isinstance(sampler, ProxySampler) or not sampler.fusable:
            super()._dummy_sampler_run(hidden_states)
            return
        count = hidden_states.shape[0]
        hidden, steering = self.model.unpack(hidden_states)
        logits = self.model.logits_for_sampling(hidden)
        used = frozenset((*FILTERS, PLAUSIBILITY))
        sampler.draw(logits, sampler.row_buffers.rows(steering, used))
        rows = torch.arange(count, device=self.device)
        combined = self.model.combine(logits, steering, rows)
        sampler(combined, InputBatch.make_dummy(count, count, self.input_buffers))

    def draw(
        self,
        hidden: list[torch.Tensor],  # 3 x [B, d_m]
        rows: RowParameters,
    ) -> torch.Tensor:  # [B] int64
        """One token a row, from the head weights where those fit, else from logits."""
        model, heads = self.model, self.model.fused_heads
        fits = heads is not None and len(hidden[0]) <= model.proxy_config.fused_head_max_batch
        if fits and not rows.filtered and not rows.masked and not self.sampler.use_fp64_gumbel:
            return heads.sample(hidden, rows)
        return self.sampler.draw(model.logits_for_sampling(hidden), rows)

    def capture_model(self, *, profile_only: bool = False) -> int:
        """vLLM's graphs of the model, then ours of sampling; bytes of device memory taken."""
        taken = super().capture_model(profile_only=profile_only)
        manager, sampler = self.cudagraph_manager, self.sampler
        if not self.model.proxy_config.sampler_cuda_graphs or sampler is None:
            return taken
        if not manager.needs_capture() or not getattr(sampler, "fusable", False):
            logger.warning(
                "--sampler-cuda-graphs is without effect: CUDA graphs are off, or an option"
                " replaces the sampler"
            )
            return taken
        with freeze_gc_for_cudagraph_capture(), graph_capture(device=self.device):
            torch.accelerator.empty_cache()
            free = torch.accelerator.get_memory_info()[0]
            sizes = self.compilation_config.cudagraph_capture_sizes
            self.capture_sampler(sizes, cuda_graph_recorder(manager.pool, self.vllm_config))
            taken += free - torch.accelerator.get_memory_info()[0]
        if profile_only:
            # Recorded into a pool that vLLM throws away, to learn what the graphs will take.
            self.sampler_graphs = None
        return taken

    @torch.inference_mode()
    def capture_sampler(self, sizes: list[int], record: Record) -> None:
        """Let steps that the fused path covers whole replay what ``record`` makes of them."""
        sizes = [size for size in sizes if size <= self.max_num_reqs]
        if sizes:
            graphs = SamplerGraphs(self.draw, self.model, self.sampler, sizes, self.device)
            graphs.capture(record)
            self.sampler_graphs = graphs

    def shutdown(self) -> None:
        self.sampler_graphs = None
        super().shutdown()

    def gather_batch_req_state(
        self, scheduler_output: SchedulerOutput, dummy_run: bool
    ) -> tuple[BatchReqState | None, int | None]:
        """Keep a step whose rows differ between models out of graphs of the whole model.

        vLLM lets the last token of a chunked prompt run as a decode; another model may not have
        that token, or read a different one.
        """
        state, uniform = super().gather_batch_req_state(scheduler_output, dummy_run)
        own = self.model_state.own
        if state is not None and own is not None and uniform is not None:
            computed = self.req_states.num_computed_tokens_np[state.idx_mapping_np]
            if own.any_prefilling(state.req_ids, computed):
                return state._replace(decode_graph_eligible=False), None
        return state, uniform

    def _measure_changed_tokens(self, hidden_states: torch.Tensor, input_batch: InputBatch) -> None:
        # Of drafted positions the first is a token in any case; the others may be rejected.
        count = input_batch.num_reqs
        first = input_batch.cu_num_logits[:count].long()
        prompts = self.req_states.prefill_len.gpu[input_batch.idx_mapping[:count]]
        read = prompts <= input_batch.seq_lens[:count]
        rows = hidden_states[input_batch.logits_indices[first]]
        self.changed_tokens.measure(self.model, rows, read)

    def sample(
        self,
        hidden_states: torch.Tensor,  # [T, packed width], as the composite's forward returned it
        input_batch: InputBatch,
        grammar_output: GrammarOutput | None,
    ) -> tuple[SamplerOutput, torch.Tensor, torch.Tensor]:
        if self.changed_tokens.due():
            self._measure_changed_tokens(hidden_states, input_batch)
        sampler, verifier = self.sampler, self.rejection_sampler
        drafted = input_batch.num_draft_tokens > 0
        if (
            not isinstance(sampler, ProxySampler)
            or not sampler.fusable
            or self.batch_sharder is not None
            or (drafted and not isinstance(verifier, DraftVerifier))
        ):
            return super().sample(hidden_states, input_batch, grammar_output)
        grammar_ids = grammar_output.structured_output_request_ids if grammar_output else []
        others = sampler.requests_of_distribution(input_batch, grammar_ids)
        explained = sampler.requests_explained(input_batch)
        if len(others) == input_batch.num_reqs and not len(explained):
            return super().sample(hidden_states, input_batch, grammar_output)

        scored, alone = sampler.requests_of_logprobs(input_batch, others), self.model.some_alone
        graphs = self.sampler_graphs
        if (
            graphs is not None
            and not len(others)
            and not len(explained)
            and not alone
            and not drafted
            and graphs.holds(input_batch.num_reqs)
        ):
            output = sampler.output_of(graphs.sample(hidden_states, input_batch), input_batch)
            return output, output.num_sampled, output.num_rejected

        hidden, steering = self.model.unpack(hidden_states[input_batch.logits_indices])
        if alone or len(others) or len(scored) or len(explained):
            logits, steering = self.model.logits_and_steering(hidden, steering)
            parameters = sampler.rows_of(input_batch, steering)
            tokens = sampler.draw(logits, parameters)
        else:
            parameters = sampler.rows_of(input_batch, steering)
            tokens = self.draw(hidden, parameters)
        output = sampler.output_of(tokens, input_batch)
        if len(scored):
            index = async_tensor_h2d(logit_rows(input_batch, scored), device=self.device)
            found = sampler.logprobs_by_shards(
                logits, parameters, tokens, input_batch, scored, index
            )
            merge_logprobs(output, found, index)
        if len(others):
            part, index = select_requests(input_batch, others, self.device)
            combined = self.model.combine(logits, steering, index, parameters.masked)
            if grammar_output is not None:
                self.structured_outputs_worker.apply_grammar_bitmask(
                    combined, part, grammar_ids, grammar_output.grammar_bitmask
                )
            output = merge(output, sampler(combined, part), index)
        if len(explained):
            self._explain(output, logits, steering, input_batch, explained)
        if drafted:
            invalid = None
            if grammar_output is not None:
                invalid = grammar_invalid_drafts(
                    input_batch, grammar_ids, grammar_output.num_acceptable_drafts
                )
            output = verifier.accept(output, input_batch, invalid)
        return output, output.num_sampled, output.num_rejected

    def _explain(
        self,
        output: SamplerOutput,  # a token for each row of logits
        logits: MemberLogits,
        steering: Steering,  # of N rows
        input_batch: InputBatch,
        requests: np.ndarray,
    ) -> None:
        """Add what steering did to the tokens of some requests, in place."""
        rows = logit_rows(input_batch, requests)
        index = async_tensor_h2d(rows, device=self.device)
        tokens = output.sampled_token_ids[:, 0]
        top = int(self.sampler.explain_top[input_batch.idx_mapping_np[requests]].max())
        ids, scores = member_scores(
            self.model, logits.select(index), steering.select(index), tokens[index], top
        )
        output.logprobs_tensors = attach(output.logprobs_tensors, len(tokens), index, ids, scores)
