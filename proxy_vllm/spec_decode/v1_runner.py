"""Drafts and their verification on the V1 runner of a CPU.

vLLM draws the tokens of drafted positions there by other rules than those of plain steps: without
min-p and logit bias, and with other noise. Here each position is drawn by vLLM's own sampler, one
after the other as far as drafts hold, so an answer is that of a run without drafts: greedy, or by
a request's seed.
"""

from copy import copy
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from vllm.config import get_layers_from_vllm_config
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.logits_processor import BUILTIN_LOGITS_PROCESSORS, LogitsProcessors
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.rejection_sampler import RejectionSampler
from vllm.v1.sample.thinking_budget_state import maybe_create_thinking_budget_state_holder
from vllm.v1.spec_decode.draft_model import DraftModelProposer
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from proxy_vllm.errors import UserError


class ExpertProposer(DraftModelProposer):
    """Drafts greedily with the composite's expert, its layers and its KV cache."""

    def __init__(self, runner: GPUModelRunner) -> None:
        super().__init__(runner.vllm_config, runner.device, runner)
        self.runner = runner

    def load_model(self, target_model: nn.Module) -> None:
        self.target = target_model
        self.drafter = target_model.proxy_config.drafter
        self.model = getattr(target_model, self.drafter)
        layers = get_layers_from_vllm_config(self.vllm_config, AttentionLayerBase)
        self._draft_attn_layer_names = {
            name for name in layers if name.startswith(f"{self.drafter}.")
        }
        # Only drafters that read the target's hidden states use these.
        self.hidden_states = self.inputs_embeds = torch.empty(0)

    def validate_same_kv_cache_group(self, kv_cache_config: KVCacheConfig) -> None:
        groups = [set(group.layer_names) for group in kv_cache_config.kv_cache_groups]
        if sum(bool(names & self._draft_attn_layer_names) for names in groups) > 1:
            raise UserError(
                "--speculative-tokens on a CPU needs an expert whose layers are of one kind, and"
                " this one mixes windows with full attention: leave the option out"
            )

    def propose(
        self,
        num_speculative_tokens: int,
        target_token_ids: torch.Tensor,
        target_positions: torch.Tensor,
        target_hidden_states: torch.Tensor,
        next_token_ids: torch.Tensor,  # [B], drawn last
        token_indices_to_sample: torch.Tensor | None,
        common_attn_metadata: CommonAttentionMetadata,
        sampling_metadata: SamplingMetadata,
        mm_embed_inputs: Any = None,
        num_rejected_tokens_gpu: torch.Tensor | None = None,  # [B]
        slot_mappings: Any = None,
    ) -> torch.Tensor:  # [B, K]
        """K forwards of one token a request; the verified tokens are in the KV cache already."""
        batch = common_attn_metadata.batch_size()
        metadata = copy(common_attn_metadata)
        seq_lens = metadata.seq_lens[:batch]
        rejected = num_rejected_tokens_gpu
        metadata.seq_lens = seq_lens.clone() if rejected is None else seq_lens - rejected
        if metadata.seq_lens_cpu_upper_bound is not None:
            metadata.seq_lens_cpu_upper_bound = metadata.seq_lens_cpu_upper_bound.clone()
        # vLLM hands over what the first group of layers reads, whichever the expert's is.
        table = self.runner.input_batch.block_table[self.kv_cache_gid]
        metadata.block_table_tensor = table.get_device_tensor(batch)
        metadata.num_actual_tokens = batch
        metadata.max_query_len = 1
        metadata.query_start_loc = self.arange[: batch + 1]
        metadata.query_start_loc_cpu = torch.from_numpy(self.token_arange_np[: batch + 1]).clone()

        if self.runner.lora_config is not None:
            self.runner.set_adapters_of_drafts()
        mode, padded, across_dp = self._determine_batch_execution_and_padding(batch)
        # Of the token before: each step goes on by one. A row at the length limit gets position 0
        # from vLLM, and must not go on from there and write keys.
        before = metadata.seq_lens.long() - 1
        tokens, drafts = next_token_ids, []
        for step in range(num_speculative_tokens):
            self._update_positions_dependent_metadata(
                before + step, metadata, batch, padded, self.block_size
            )
            _, by_layer = self.build_per_group_and_layer_attn_metadata(metadata, step)
            known = self.input_ids[:batch].copy_(tokens)
            known.masked_fill_(known >= self.target.vocab_sizes[self.drafter], 0)
            with set_forward_context(
                by_layer,
                self.vllm_config,
                num_tokens=padded,
                num_tokens_across_dp=across_dp,
                cudagraph_runtime_mode=mode,
                slot_mapping=self._get_slot_mapping(padded),
            ):
                hidden = self.model(self.input_ids[:padded], self.positions[:padded])
            logits = self.model.compute_logits(hidden[:batch])[:, : self.target.columns.named]
            tokens = logits.argmax(dim=-1)
            drafts.append(tokens)
        if not drafts:
            return next_token_ids.new_empty(batch, 0)
        return torch.stack(drafts, dim=1)


class DraftVerifier(RejectionSampler):
    """Draws position after position by the plain sampler, as far as a request's drafts hold."""

    def __init__(self, runner: GPUModelRunner) -> None:
        super().__init__(runner.sampler)
        self.runner = runner

    def forward(
        self,
        metadata: SpecDecodeMetadata,
        draft_probs: torch.Tensor | None,
        logits: torch.Tensor,  # [N, V], a request's rows one after the other
        sampling_metadata: SamplingMetadata,
    ) -> SamplerOutput:
        """Tokens ``[B, K + 1]`` int32, -1 behind those that count."""
        counts = np.array(metadata.num_draft_tokens)  # [B]
        starts = np.cumsum(counts + 1) - (counts + 1)
        width = int(counts.max()) + 1
        drafts = np.full((len(counts), width), -1)
        drafts[np.arange(width) < counts[:, None]] = metadata.draft_token_ids.numpy()
        tokens: np.ndarray = np.full((len(counts), width), -1, dtype=np.int32)
        drawn = self._independent(logits, sampling_metadata)
        scores: list[LogprobsTensors] = []
        outputs = self.runner.input_batch.req_output_token_ids
        lengths = [len(ids or ()) for ids in outputs[: len(counts)]]
        going: np.ndarray = np.ones(len(counts), dtype=bool)
        try:
            for j in range(width):
                rows = starts + np.minimum(j, counts)
                if drawn is not None:
                    column = drawn[rows]
                else:
                    column, score = self._draw(logits, rows, going, sampling_metadata)
                    if score is not None:
                        scores.append(score)
                tokens[going, j] = column[going]
                going &= (j < counts) & (column == drafts[:, j])
                if not going.any():
                    break
                if drawn is None:
                    self._commit(going, column, outputs, sampling_metadata)
        finally:
            for ids, length in zip(outputs, lengths):
                if ids is not None:
                    del ids[length:]
        logprobs = None
        if scores:
            # vLLM drops the entries of positions without a token.
            scores += [scores[0]] * (width - len(scores))
            logprobs = LogprobsTensors(
                *(torch.stack(parts, 1).flatten(0, 1) for parts in zip(*(s[:3] for s in scores)))
            )
        return SamplerOutput(sampled_token_ids=torch.from_numpy(tokens), logprobs_tensors=logprobs)

    def _draw(
        self, logits: torch.Tensor, rows: np.ndarray, going: np.ndarray, sampling: SamplingMetadata
    ) -> tuple[np.ndarray, LogprobsTensors | None]:
        """One token a request, from generators of the requests alone whose drafts hold so far."""
        generators = {i: g for i, g in sampling.generators.items() if going[i]}
        budgets = sampling.thinking_budget_state_holder
        if budgets is not None:
            # It counts the tokens of each call, and another row's must not be counted twice.
            budgets = copy(budgets)
            budgets._state = {i: state for i, state in budgets._state.items() if going[i]}
        output = self.sampler(
            logits=logits[torch.from_numpy(rows)],
            sampling_metadata=replace(
                sampling,
                generators=generators,
                thinking_budget_state_holder=budgets,
                spec_token_ids=None,
            ),
        )
        return output.sampled_token_ids[:, 0].numpy(), output.logprobs_tensors

    @staticmethod
    def _commit(
        going: np.ndarray,
        column: np.ndarray,
        outputs: list[list[int] | None],
        sampling: SamplingMetadata,
    ) -> None:
        """Let penalties and the like of the next position see the tokens drawn just now."""
        for i in np.flatnonzero(going):
            ids = outputs[i]
            assert ids is not None
            ids.append(int(column[i]))
        for processor in sampling.logitsprocs.all:
            processor.update_state(None)

    def _independent(self, logits: torch.Tensor, sampling: SamplingMetadata) -> np.ndarray | None:
        """Tokens ``[N]`` at once, where none depends on those before but through its logits."""
        holder = sampling.thinking_budget_state_holder
        if (
            not sampling.all_greedy
            or sampling.max_num_logprobs is not None
            or sampling.logprob_token_ids
            or not sampling.no_penalties
            or sampling.bad_words_token_ids
            or sampling.allowed_token_ids_mask is not None
            or (holder is not None and holder.has_tracked_requests())
            # What a processor holds of requests: their minimum lengths, or their biases.
            or any(
                getattr(processor, name, None)
                for processor in sampling.logitsprocs.non_argmax_invariant
                for name in ("min_toks", "biases")
            )
        ):
            return None
        return self.sampler.greedy_sample(logits.float()).numpy()


def count_thoughts_by_position(runner: GPUModelRunner) -> None:
    """Have thinking budgets counted position by position, as positions are drawn here.

    In an engine with drafts, vLLM (0.32.0) takes a step without any for one of no rows, and forces
    the end of a thought on the first request of the batch instead of the one whose thought it is.
    """
    batch = runner.input_batch
    batch.thinking_budget_state_holder = maybe_create_thinking_budget_state_holder(
        runner.vllm_config.reasoning_config, runner.max_num_reqs, 0, runner.device, False
    )
    batch.sampling_metadata = batch._make_sampling_metadata()


def let_the_expert_draft(runner: GPUModelRunner) -> None:
    """Put both in place of vLLM's on a runner that has no weights yet, and its whole sampler."""
    runner.drafter = ExpertProposer(runner)
    runner.rejection_sampler = DraftVerifier(runner)
    batch = runner.input_batch
    # Beside speculation vLLM leaves out those of min-p and logit bias.
    batch.logitsprocs = LogitsProcessors(
        processor(runner.vllm_config, runner.device, False)
        for processor in BUILTIN_LOGITS_PROCESSORS
    )
    batch.sampling_metadata = batch._make_sampling_metadata()
