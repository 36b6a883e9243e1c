"""Draft verification on Model Runner V2: a draft holds where it is the token that was drawn.

Row ``j`` of a request has read the drafts before it. Its token is drawn with the noise of its own
position, as in a step without drafts, and is right if those drafts are. So tokens count up to and
including the first that differs from its draft, and the answer is that of a run without drafts,
whatever made them. (vLLM's rejection sampler gives the same distribution, by other noise, only for
drafts that do not depend on the noise of the draw.)
"""

from dataclasses import replace

import torch
from vllm.triton_utils import tl, triton
from vllm.v1.worker.gpu.input_batch import InputBatch, get_num_sampled_and_rejected
from vllm.v1.worker.gpu.sample.output import SamplerOutput
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import gather_draft_sampled


@triton.jit
def _accept_kernel(
    drawn_ptr,  # [N] one token a row of logits
    drafts_ptr,  # [N] the token that the row has read; -1 where it is no valid draft
    cu_num_logits_ptr,  # [B + 1]
    out_ptr,  # [B, K + 1]
    out_stride,
    num_sampled_ptr,  # [B]
):
    request = tl.program_id(0)
    start = tl.load(cu_num_logits_ptr + request)
    count = tl.load(cu_num_logits_ptr + request + 1) - start
    going = (count > 0).to(tl.int32)
    accepted = going * 0
    for j in range(count):
        token = tl.load(drawn_ptr + start + j)
        tl.store(out_ptr + request * out_stride + j, token)
        accepted += going
        draft = tl.load(drafts_ptr + start + j + 1, mask=j + 1 < count, other=-1)
        going *= (draft == token).to(tl.int32)
    tl.store(num_sampled_ptr + request, accepted)


class DraftVerifier:
    """Stands in for vLLM's ``RejectionSampler``.

    Args:
        sampler: draws a token for every row of logits.
        num_speculative_steps: K.
    """

    def __init__(self, sampler: Sampler, num_speculative_steps: int) -> None:
        self.sampler = sampler
        self.num_speculative_steps = num_speculative_steps

    def __call__(
        self,
        logits: torch.Tensor,  # [N, V], N = B + drafts
        input_batch: InputBatch,
        draft_logits: torch.Tensor | None = None,
        invalid_drafts: torch.Tensor | None = None,  # [N] bool
    ) -> SamplerOutput:
        return self.accept(self.sampler(logits, input_batch), input_batch, invalid_drafts)

    def accept(
        self,
        output: SamplerOutput,
        input_batch: InputBatch,
        invalid_drafts: torch.Tensor | None = None,  # [N] bool
    ) -> SamplerOutput:
        """Turn a token of every row, ``[N, 1]``, into the tokens of every request, ``[B, K + 1]``.

        Args:
            output: what a sampler returned for all rows of the batch.
            input_batch: with draft tokens.
            invalid_drafts: rows whose draft a grammar has not checked; they count as rejected.
        """
        sampler = self.sampler
        prefill_len = sampler.req_states.prefill_len.gpu
        drafts, _ = gather_draft_sampled(
            input_batch.input_ids,
            input_batch.positions,
            input_batch.logits_indices,
            input_batch.expanded_idx_mapping,
            input_batch.expanded_local_pos,
            prefill_len,
        )
        if invalid_drafts is not None:
            drafts = drafts.masked_fill(invalid_drafts, -1)
        num_reqs = input_batch.num_reqs
        drawn = output.sampled_token_ids
        tokens = drawn.new_zeros(num_reqs, self.num_speculative_steps + 1)
        num_sampled = input_batch.seq_lens.new_empty(num_reqs)
        _accept_kernel[(num_reqs,)](
            drawn, drafts, input_batch.cu_num_logits, tokens, tokens.stride(0), num_sampled
        )
        num_sampled, num_rejected = get_num_sampled_and_rejected(
            num_sampled,
            input_batch.seq_lens,
            input_batch.cu_num_logits,
            input_batch.idx_mapping,
            prefill_len,
        )
        logprobs = output.logprobs_tensors
        if logprobs is not None:
            # A request's entries begin at its first row; those past its last token are not read.
            starts = input_batch.cu_num_logits_np.tolist()
            logprobs = logprobs._replace(cu_num_generated_tokens=starts)
        return replace(
            output,
            sampled_token_ids=tokens,
            logprobs_tensors=logprobs,
            num_sampled=num_sampled,
            num_rejected=num_rejected,
        )
