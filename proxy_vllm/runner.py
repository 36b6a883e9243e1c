"""Model Runner V2 for proxy-tuned models: sampling straight from the three members' logits."""

import torch
from vllm.v1.core.sched.output import GrammarOutput
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu.sample.output import SamplerOutput

from proxy_vllm.sampler import ProxySampler, merge, select_rows


class ProxyModelRunner(GPUModelRunner):
    """vLLM's runner, with the fused path wherever the sampler covers a row (see sampler.py)."""

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
            output = sampler.output_of(tokens, input_batch)
            return output, output.num_sampled, output.num_rejected
        logits = self.model.logits_for_sampling(hidden)
        output = sampler.output_of(sampler.sample_fused(logits, input_batch), input_batch)
        if len(rows):
            part, index = select_rows(input_batch, rows, self.device)
            combined = self.model.combine(logits, alpha, index)
            if grammar_output is not None:
                self.structured_outputs_worker.apply_grammar_bitmask(
                    combined, part, grammar_ids, grammar_output.grammar_bitmask
                )
            output = merge(output, sampler(combined, part), index)
        return output, output.num_sampled, output.num_rejected
