"""Model Runner V2 for proxy-tuned models: sampling straight from the three members' logits."""

import torch
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_runner import BatchReqState, GPUModelRunner
from vllm.v1.worker.gpu.sample.output import SamplerOutput

from proxy_vllm.sampler import ProxySampler, merge, select_rows


class ProxyModelRunner(GPUModelRunner):
    """vLLM's runner, with the fused path wherever the sampler covers a row (see sampler.py)."""

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

    def sample(
        self,
        hidden_states: torch.Tensor,  # [T, packed width], as the composite's forward returned it
        input_batch: InputBatch,
        grammar_output: GrammarOutput | None,
    ) -> tuple[SamplerOutput, torch.Tensor, torch.Tensor]:
        sampler = self.sampler
        if (
            not isinstance(sampler, ProxySampler)
            or not sampler.fusable
            or self.batch_sharder is not None
            or input_batch.num_draft_tokens > 0
        ):
            return super().sample(hidden_states, input_batch, grammar_output)
        grammar_ids = grammar_output.structured_output_request_ids if grammar_output else []
        rows = sampler.rows_of_distribution(input_batch, grammar_ids)
        if len(rows) == input_batch.num_reqs:
            return super().sample(hidden_states, input_batch, grammar_output)

        hidden, alpha = self.model.unpack(hidden_states[input_batch.logits_indices])
        heads = self.model.fused_heads
        if (
            heads is not None
            and not len(rows)
            and input_batch.num_reqs <= self.model.proxy_config.fused_head_max_batch
            and sampler.without_filters(input_batch)
        ):
            tokens = sampler.sample_heads(heads, hidden, input_batch)
        else:
            logits = self.model.logits_for_sampling(hidden)
            tokens = sampler.sample_fused(logits, input_batch)
        output = sampler.output_of(tokens, input_batch)
        if len(rows):
            part, index = select_rows(input_batch, rows, self.device)
            combined = self.model.combine(logits, alpha, index)
            if grammar_output is not None:
                self.structured_outputs_worker.apply_grammar_bitmask(
                    combined, part, grammar_ids, grammar_output.grammar_bitmask
                )
            output = merge(output, sampler(combined, part), index)
        return output, output.num_sampled, output.num_rejected
