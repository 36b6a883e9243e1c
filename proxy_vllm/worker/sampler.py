"""The sampler of Model Runner V2: the members' logits in, one token a row out.

Two paths, chosen for each row, so that one special row does not slow the batch:

- *fused* (``kernels/combine_sample.py``): greedy, temperature, seeds, min-p, top-k, top-p. The
  combined logits never exist in memory unless a row has top-k or top-p.
- *whole distribution*: what needs every combined logit goes through ``proxy_combine`` and then
  vLLM's own sampler: logprobs, penalties, logit bias, allowed and bad words, minimum tokens,
  grammars, thinking budgets and custom logits processors.

What steering does to a row's token (``explain/``) is computed after the draw, on either path.

Over tensor-parallel ranks, log-probabilities alone do not make a row special: the ranks exchange
their candidates and log-sum-exps instead of logits.

The whole batch takes the second path where vLLM replaces or wraps sampling: batch-sharded sampling,
sampling-mask and trace replay, counting NaN logits, and watermarking, for which vLLM has a sampler
of its own.

A request that verifies drafts has a row of logits for each of them and one more; a row is drawn as
if it stood alone (see ``spec_decode/verification.py``).

Alpha and the plausibility threshold reach both paths by one road, as bits in the hidden states (see
``composite/packed_rows.py``), because vLLM's own code between the model and ``compute_logits``
picks rows of hidden states and knows nothing of request slots. Every other parameter comes from
vLLM's request slots (``row_buffers.py``).
"""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from vllm.sampling_params import SamplingParams
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu.input_batch import InputBatch, get_num_sampled_and_rejected
from vllm.v1.worker.gpu.sample.output import SamplerOutput
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.sample.states import NO_LOGPROBS

from proxy_vllm.composite.heads import MemberLogits
from proxy_vllm.config import ProxyConfig
from proxy_vllm.explain.request import without_rows, worker_top
from proxy_vllm.kernels.combine_sample import proxy_sample
from proxy_vllm.kernels.row_parameters import PLAUSIBILITY, RowParameters, Steering
from proxy_vllm.kernels.sharded import Exchange, ShardedSampler
from proxy_vllm.worker.row_buffers import RowBuffers

# Ranks send their candidates twice (values and token ids), so that with many of them it is cheaper
# to gather the logits.
MAX_SHARD_LOGPROBS = 256


class ProxySampler(Sampler):
    """vLLM's sampler with a fused path over the three members' logits.

    Args:
        sampler: the sampler that vLLM made; its state is taken over, not copied.
        device: of the logits.
        proxy_config: of the engine.
        exchange: what tensor-parallel ranks talk through, where heads are sharded.
    """

    def __init__(
        self,
        sampler: Sampler,
        device: torch.device,
        proxy_config: ProxyConfig,
        exchange: Exchange | None = None,
    ) -> None:
        # vLLM makes its sampler before it asks for ours and keeps no other reference to it. All
        # state is in attributes (`Sampler` has no slots), which stay the very same objects.
        self.__dict__.update(sampler.__dict__)
        self.proxy_config, self.exchange = proxy_config, exchange
        # vLLM's name for the rows of logits that a request may have: one, and one a draft token.
        most = self.sampling_states.max_num_reqs * self.num_speculative_tokens
        self.row_buffers = RowBuffers(most, device)
        self.needs_distribution = np.zeros_like(self.needs_logits_processing)
        # How many of the likeliest tokens a request wants explained, by slot; 0 for none.
        self.explain_top: np.ndarray = np.zeros(len(self.needs_distribution), dtype=int)
        # Requests that may lose implausible tokens.
        self.masked = np.zeros_like(self.needs_logits_processing)
        self.fusable = (
            type(sampler) is Sampler
            and not self.compute_nans
            and not self.return_sampling_mask
            and self.trace_replay_state is None
        )

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> None:
        super().add_request(req_idx, without_rows(sampling_params))
        self.explain_top[req_idx] = worker_top(sampling_params)
        self.needs_distribution[req_idx] = self._wants_distribution(req_idx)
        log_beta, _ = self.proxy_config.plausibility_of(sampling_params)
        self.masked[req_idx] = log_beta > -math.inf

    def _wants_distribution(self, req_idx: int) -> bool:
        """Whether a request's parameters go beyond what the fused path knows.

        ``needs_logits_processing`` is vLLM's own answer over all stages; it is narrowed only by
        the stages that the fused path does itself, so a stage that vLLM adds stays covered.
        """
        wanted = self.sampling_states.num_logprobs[req_idx]
        if wanted != NO_LOGPROBS and not self._scores_by_shards(wanted):
            return True
        if self.logprob_token_ids_state.max_num_token_ids(np.array([req_idx])):
            return True
        if not self.needs_logits_processing[req_idx]:
            return False
        return self._other_stages(req_idx)

    def _scores_by_shards(self, num_logprobs: int) -> bool:
        """Whether the ranks can find log-probabilities without gathering logits."""
        raw = self.logprobs_mode == "raw_logprobs"
        return self.exchange is not None and raw and num_logprobs <= MAX_SHARD_LOGPROBS

    def _other_stages(self, req_idx: int) -> bool:
        """Whether a stage other than temperature, min-p, top-k and top-p touches the logits."""
        bias, penalties, bad_words, *custom = self.logits_processors
        # Absent where the server has no reasoning configuration.
        budget = getattr(self.thinking_budget_state, "use_thinking_budget", None)
        return bool(
            custom
            or bias.use_logit_bias[req_idx]
            or penalties.use_penalty[req_idx]
            or bad_words.num_bad_words.np[req_idx]
            or (budget is not None and budget[req_idx])
        )

    def requests_of_distribution(
        self, input_batch: InputBatch, grammar_req_ids: list[str]
    ) -> np.ndarray:
        """Requests of the batch, ascending, that must go through vLLM's own sampler."""
        needs = self.needs_distribution[input_batch.idx_mapping_np]
        if grammar_req_ids:
            constrained = set(grammar_req_ids)
            needs = needs | np.array([r in constrained for r in input_batch.req_ids])
        return np.flatnonzero(needs)

    def requests_of_logprobs(self, input_batch: InputBatch, others: np.ndarray) -> np.ndarray:
        """Requests, ascending, that want log-probabilities and are not among the others."""
        wants = self.sampling_states.num_logprobs[input_batch.idx_mapping_np] != NO_LOGPROBS
        wants[others] = False
        return np.flatnonzero(wants)

    def requests_explained(self, input_batch: InputBatch) -> np.ndarray:
        """Requests, ascending, that ask what steering does."""
        return np.flatnonzero(self.explain_top[input_batch.idx_mapping_np])

    def filters(self, input_batch: InputBatch) -> frozenset[str]:
        """Which of top_k, top_p and min_p a row of the batch uses, and whether one is masked."""
        states, slots = self.sampling_states, input_batch.idx_mapping_np
        masked = (PLAUSIBILITY,) if self.masked[slots].any() else ()
        off = {"top_k": states.vocab_size, "top_p": 1.0, "min_p": 0.0}
        return frozenset(masked).union(
            name for name, value in off.items() if np.any(getattr(states, name).np[slots] != value)
        )

    def rows_of(
        self,
        input_batch: InputBatch,
        steering: Steering,  # of each row of logits
    ) -> RowParameters:
        """What decides the tokens of a batch besides its logits.

        One entry for each row of logits, draft tokens included. The vectors are this sampler's
        own and hold until the next call.
        """
        self.row_buffers.gather(input_batch, self.sampling_states)
        return self.row_buffers.rows(steering, self.filters(input_batch))

    def draw(self, logits: MemberLogits, rows: RowParameters) -> torch.Tensor:  # [B] int64
        """One token a row from the members' logits."""
        draw: Callable[..., torch.Tensor] = proxy_sample
        if logits.sharded:
            assert self.exchange is not None
            draw = ShardedSampler(self.exchange).sample
        base, expert, antiexpert = logits.members
        return draw(
            base,
            expert,
            antiexpert,
            rows,
            columns=logits.columns,
            use_fp64_gumbel=self.use_fp64_gumbel,
        )

    def logprobs_by_shards(
        self,
        logits: MemberLogits,
        rows: RowParameters,  # of N rows
        tokens: torch.Tensor,  # [N] int64
        input_batch: InputBatch,
        requests: np.ndarray,
        index: torch.Tensor,  # their rows of logits, on the device
    ) -> LogprobsTensors:
        """Of some requests, whose logits lie on several ranks."""
        assert self.exchange is not None
        slots = input_batch.idx_mapping_np[requests]
        base, expert, antiexpert = logits.select(index).members
        ids, scores, ranks = ShardedSampler(self.exchange).logprobs(
            base,
            expert,
            antiexpert,
            rows.select(index),
            tokens[index],
            int(self.sampling_states.num_logprobs[slots].max()),
            columns=logits.columns,
        )
        return LogprobsTensors(ids, scores, ranks + 1)  # vLLM counts ranks from 1

    def output_of(self, tokens: torch.Tensor, input_batch: InputBatch) -> SamplerOutput:
        """vLLM's output for tokens ``[N]`` of which none asks for more than itself."""
        num_sampled, num_rejected = get_num_sampled_and_rejected(
            input_batch.seq_lens.new_ones(input_batch.num_reqs),
            input_batch.seq_lens,
            input_batch.cu_num_logits,
            input_batch.idx_mapping,
            self.req_states.prefill_len.gpu,
        )
        return SamplerOutput(
            sampled_token_ids=tokens.view(-1, 1),
            logprobs_tensors=None,
            num_nans=None,
            num_sampled=num_sampled,
            num_rejected=num_rejected,
        )


def logit_rows(input_batch: InputBatch, requests: np.ndarray) -> np.ndarray:
    """The rows of logits of some requests, ascending: one each, and one more for each draft."""
    starts = input_batch.cu_num_logits_np
    if input_batch.num_draft_tokens == 0:
        return requests
    return np.concatenate([np.arange(starts[i], starts[i + 1]) for i in requests])


def select_requests(
    input_batch: InputBatch, requests: np.ndarray, device: torch.device
) -> tuple[InputBatch, torch.Tensor]:
    """The batch of some requests alone, as far as a sampler reads it, and their rows of logits."""
    index = async_tensor_h2d(requests, device=device)
    rows = async_tensor_h2d(logit_rows(input_batch, requests), device=device)
    drafts = input_batch.num_draft_tokens_per_req
    drafts = None if drafts is None else drafts[requests]
    counts = np.ones(len(requests), dtype=int) if drafts is None else 1 + drafts
    starts = np.zeros(len(requests) + 1, dtype=input_batch.cu_num_logits_np.dtype)
    np.cumsum(counts, out=starts[1:])
    batch = replace(
        input_batch,
        req_ids=[input_batch.req_ids[i] for i in requests],
        num_reqs=len(requests),
        num_reqs_after_padding=len(requests),
        num_draft_tokens=0 if drafts is None else int(drafts.sum()),
        num_draft_tokens_per_req=drafts,
        idx_mapping=input_batch.idx_mapping[index],
        idx_mapping_np=input_batch.idx_mapping_np[requests],
        expanded_idx_mapping=input_batch.expanded_idx_mapping[rows],
        expanded_local_pos=input_batch.expanded_local_pos[rows],
        seq_lens=input_batch.seq_lens[index],
        seq_lens_cpu_upper_bound=input_batch.seq_lens_cpu_upper_bound[torch.from_numpy(requests)],
        logits_indices=input_batch.logits_indices[rows],
        cu_num_logits=async_tensor_h2d(starts, device=device),
        cu_num_logits_np=starts,
    )
    return batch, rows


def merge(output: SamplerOutput, part: SamplerOutput, index: torch.Tensor) -> SamplerOutput:
    """Write the rows that vLLM's sampler drew over those of the fused path."""
    output.sampled_token_ids[index] = part.sampled_token_ids
    if part.logprobs_tensors is not None:
        merge_logprobs(output, part.logprobs_tensors, index)
    return output


def merge_logprobs(output: SamplerOutput, part: LogprobsTensors, index: torch.Tensor) -> None:
    """Write the log-probabilities of some rows; rows that asked for none are never read."""
    num_rows = output.sampled_token_ids.shape[0]
    before = output.logprobs_tensors
    width = part.logprobs.shape[1]
    if before is not None:
        width = max(width, before.logprobs.shape[1])
    merged = []
    for i, tensor in enumerate(part[:3]):
        whole = tensor.new_zeros((num_rows, width) if tensor.dim() == 2 else num_rows)
        if before is not None:
            whole[..., : before[i].shape[-1]] = before[i]
        # A row asks for no more than its part is wide.
        if tensor.dim() == 2:
            whole[index, : tensor.shape[1]] = tensor
        else:
            whole[index] = tensor
        merged.append(whole)
    output.logprobs_tensors = LogprobsTensors(*merged)
