"""Heads, combination and draw of a step as one CUDA graph for each padded batch size.

Off unless asked for (``--sampler-cuda-graphs``) until it has been measured against plain launches.

What a row's token depends on is copied into buffers whose addresses never change: its hidden states
here, its parameters in the sampler's row buffers. Rows past the batch are greedy, and their tokens
are not read. Two graphs a size: one for batches in which no row has a filter, one that knows every
filter. Steps that the fused path does not cover whole, and larger batches, run without.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING

import torch
from vllm.compilation.cudagraph_pool import capture_pool
from vllm.utils.torch_utils import current_stream

from proxy_vllm.kernels.row_parameters import FILTERS, PLAUSIBILITY, RowParameters
from proxy_vllm.worker.sampler import ProxySampler

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


class SamplerGraphs:
    """Captured sampling steps, and the buffers that they read and write.

    Args:
        draw: tokens ``[B]`` from hidden states ``3 x [B, d_m]`` and their parameters.
        model: the composite, which has run once.
        sampler: whose parameters the rows have.
        sizes: batch sizes to capture; a batch is padded to the next of them.
    """

    def __init__(
        self,
        draw: Callable[[list[torch.Tensor], RowParameters], torch.Tensor],
        model: "ProxyTunedForCausalLM",
        sampler: ProxySampler,
        sizes: Iterable[int],
        device: torch.device,
    ) -> None:
        self.draw, self.model, self.sampler = draw, model, sampler
        self.sizes = sorted(sizes)
        self.replays: dict[tuple[int, bool], Work] = {}
        rows = self.sizes[-1]
        self.hidden = torch.zeros(
            (rows, model.packed_width), dtype=model.hidden_dtype, device=device
        )
        self.tokens = torch.zeros(rows, dtype=torch.int64, device=device)

    def capture(self, record: Record) -> None:
        """Record every size, the largest first, so that smaller ones find memory in the pool."""
        for size in reversed(self.sizes):
            for filtered in (True, False):
                self.replays[size, filtered] = record(partial(self._work, size, filtered))

    def _work(self, size: int, filtered: bool) -> None:
        """What is recorded: reads and writes this object's buffers alone."""
        hidden, steering = self.model.unpack(self.hidden[:size])
        used = frozenset((*FILTERS, PLAUSIBILITY) if filtered else ())
        rows = self.sampler.row_buffers.rows(steering, used)
        self.tokens[:size] = self.draw(hidden, rows)

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
        sampler = self.sampler
        sampler.row_buffers.gather(input_batch, sampler.sampling_states, num_padded=size)
        self.replays[size, bool(sampler.filters(input_batch))]()
        # The next step's replay writes to the same address, maybe before this one is read.
        return self.tokens[:num_rows].clone()
