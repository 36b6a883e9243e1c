"""Heads, combination and draw of a step as one CUDA graph for each padded batch size.

Off unless asked for (``--sampler-cuda-graphs``) until it has been measured against plain launches.

What a row's token depends on (hidden states, parameters, position) is copied into buffers whose
addresses never change; rows past the batch become slot -1, which the kernels define. Two graphs a
size: one for batches in which no row has a filter, one that knows every filter. Steps that the
fused path does not cover whole, and larger batches, run without.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING

import torch
from vllm.compilation.cudagraph_pool import capture_pool
from vllm.triton_utils import tl, triton
from vllm.utils.torch_utils import current_stream

from proxy_vllm.worker.sampler import ProxySampler, Rows

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.worker.gpu.input_batch import InputBatch

    from proxy_vllm.composite.model import ProxyTunedForCausalLM

Work = Callable[[], None]
Record = Callable[[Work], Work]  # takes work on fixed addresses, returns what does it again


def cuda_graph_recorder(pool: tuple[int, int] | None, vllm_config: "VllmConfig") -> Record:
    """Records into CUDA graphs that share a memory pool, on the current stream, as vLLM does."""

    def record(work: Work) -> Work:
        work()  # compiles and loads kernels, which a capture must not
        graph = torch.cuda.CUDAGraph()
        with (
            capture_pool(pool, vllm_config) as graph_pool,
            torch.cuda.graph(graph, graph_pool, stream=current_stream()),
        ):
            work()
        return graph.replay

    return record


@triton.jit(do_not_specialize=["num_rows", "num_padded"])
def _stage_kernel(
    row_to_request_ptr,  # [num_rows]
    logits_indices_ptr,  # [num_rows]
    positions_ptr,  # [T]
    alpha_ptr,  # [slots], and so all up to min_p
    temperature_ptr,
    seeds_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    out_row_ptr,  # [num_padded], and so all below
    out_position_ptr,
    out_alpha_ptr,
    out_temperature_ptr,
    out_seed_ptr,
    out_top_k_ptr,
    out_top_p_ptr,
    out_min_p_ptr,
    num_rows,
    num_padded,
    BLOCK: tl.constexpr,
):
    """Parameters by request slot to parameters by batch row; rows past the batch get slot -1."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = row < num_rows
    slot = tl.load(row_to_request_ptr + row, mask=real, other=0)
    token = tl.load(logits_indices_ptr + row, mask=real, other=0)
    tl.store(out_row_ptr + row, tl.where(real, row, -1), mask=row < num_padded)
    position = tl.load(positions_ptr + token, mask=real, other=0)
    tl.store(out_position_ptr + row, position, mask=real)
    tl.store(out_alpha_ptr + row, tl.load(alpha_ptr + slot, mask=real), mask=real)
    tl.store(out_temperature_ptr + row, tl.load(temperature_ptr + slot, mask=real), mask=real)
    tl.store(out_seed_ptr + row, tl.load(seeds_ptr + slot, mask=real), mask=real)
    tl.store(out_top_k_ptr + row, tl.load(top_k_ptr + slot, mask=real), mask=real)
    tl.store(out_top_p_ptr + row, tl.load(top_p_ptr + slot, mask=real), mask=real)
    tl.store(out_min_p_ptr + row, tl.load(min_p_ptr + slot, mask=real), mask=real)


class SamplerGraphs:
    """Captured sampling steps, and the buffers that they read and write.

    Args:
        model: the composite, which has run once.
        sampler: whose parameters the rows have.
        sizes: batch sizes to capture; a batch is padded to the next of them.
    """

    def __init__(
        self,
        model: "ProxyTunedForCausalLM",
        sampler: ProxySampler,
        sizes: Iterable[int],
        device: torch.device,
    ) -> None:
        self.model, self.sampler = model, sampler
        self.sizes = sorted(sizes)
        self.replays: dict[tuple[int, bool], Work] = {}
        rows = self.sizes[-1]

        def zeros(dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(rows, dtype=dtype, device=device)

        self.hidden = torch.zeros(
            (rows, model.packed_width), dtype=model.hidden_dtype, device=device
        )
        self.rows = Rows(
            alpha=zeros(torch.float32),
            temperature=zeros(torch.float32),
            seeds=zeros(torch.int64),
            positions=zeros(torch.int64),
            row_to_request=zeros(torch.int32),
            top_k=zeros(torch.int32),
            top_p=zeros(torch.float32),
            min_p=zeros(torch.float32),
        )
        self.rows.row_to_request.fill_(-1)
        self.tokens = zeros(torch.int64)

    def capture(self, record: Record) -> None:
        """Record every size, the largest first, so that smaller ones find memory in the pool."""
        for size in reversed(self.sizes):
            for filtered in (True, False):
                self.replays[size, filtered] = record(partial(self._work, size, filtered))

    def _work(self, size: int, filtered: bool) -> None:
        """What is recorded: reads and writes this object's buffers alone."""
        hidden, _ = self.model.unpack(self.hidden[:size])
        needed = [*self.rows.key, self.rows.row_to_request]
        if filtered:
            needed += [f for f in self.rows.filters if f is not None]
        rows = Rows(*(tensor[:size] for tensor in needed))
        self.tokens[:size] = self.sampler.sample_hidden(self.model, hidden, rows)

    def holds(self, num_rows: int) -> bool:
        return num_rows <= self.sizes[-1]

    def sample(
        self,
        hidden_states: torch.Tensor,  # [T, packed width]
        input_batch: "InputBatch",
    ) -> torch.Tensor:  # [B] int64
        """One token a row of a batch that ``holds`` and that the fused path covers whole."""
        num_rows = input_batch.num_reqs
        size = self.sizes[bisect_left(self.sizes, num_rows)]
        index = input_batch.logits_indices
        torch.index_select(hidden_states, 0, index, out=self.hidden[:num_rows])
        self._stage(input_batch, size)
        filtered = any(f is not None for f in self.sampler.filters(input_batch).values())
        self.replays[size, filtered]()
        # The next step's replay writes to the same address, maybe before this one is read.
        return self.tokens[:num_rows].clone()

    def _stage(self, input_batch: "InputBatch", size: int) -> None:
        states = self.sampler.sampling_states
        _stage_kernel[(triton.cdiv(size, 256),)](
            input_batch.idx_mapping,
            input_batch.logits_indices,
            input_batch.positions,
            # These alternate between two addresses from step to step.
            self.sampler.alpha.gpu,
            states.temperature.gpu,
            states.seeds.gpu,
            states.top_k.gpu,
            states.top_p.gpu,
            states.min_p.gpu,
            self.rows.row_to_request,
            self.rows.positions,
            self.rows.alpha,
            self.rows.temperature,
            self.rows.seeds,
            self.rows.top_k,
            self.rows.top_p,
            self.rows.min_p,
            input_batch.num_reqs,
            size,
            BLOCK=256,
        )
