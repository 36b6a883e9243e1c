"""Sampling parameters by request slot, gathered to one entry a logits row once a step.

vLLM keeps the parameters of requests in host memory that the device reads over the bus, and writes
them into two buffers in turn. The sampling kernels run thousands of programs a row, each of which
reads the row's parameters: so one launch copies them to the device, in the order of the rows, at
addresses that never change (CUDA graphs replay over them).
"""

from typing import TYPE_CHECKING

import torch
from vllm.triton_utils import tl, triton

from proxy_vllm.kernels.row_parameters import FILTERS, RowParameters, Steering

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.input_batch import InputBatch
    from vllm.v1.worker.gpu.sample.states import SamplingStates

_BLOCK = 256


@triton.jit(do_not_specialize=["num_rows", "num_padded"])
def _gather_kernel(
    slot_ptr,  # [num_rows] request slot of each row
    logits_indices_ptr,  # [num_rows] token of each row
    positions_ptr,  # [T] of each token
    temperature_ptr,  # [slots], and so all up to min_p
    seeds_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    out_temperature_ptr,  # [num_padded], and so all below
    out_seeds_ptr,
    out_positions_ptr,
    out_top_k_ptr,
    out_top_p_ptr,
    out_min_p_ptr,
    num_rows,
    num_padded,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = row < num_rows
    out = row < num_padded
    slot = tl.load(slot_ptr + row, mask=real, other=0)
    token = tl.load(logits_indices_ptr + row, mask=real, other=0)
    # Rows of padding are greedy, which costs least.
    temperature = tl.load(temperature_ptr + slot, mask=real, other=0.0)
    tl.store(out_temperature_ptr + row, temperature, mask=out)
    tl.store(out_seeds_ptr + row, tl.load(seeds_ptr + slot, mask=real, other=0), mask=out)
    position = tl.load(positions_ptr + token, mask=real, other=0)
    tl.store(out_positions_ptr + row, position, mask=out)
    tl.store(out_top_k_ptr + row, tl.load(top_k_ptr + slot, mask=real, other=0), mask=out)
    tl.store(out_top_p_ptr + row, tl.load(top_p_ptr + slot, mask=real, other=1.0), mask=out)
    tl.store(out_min_p_ptr + row, tl.load(min_p_ptr + slot, mask=real, other=0.0), mask=out)


class RowBuffers:
    """Device vectors of every sampling parameter but those that come with the hidden states."""

    def __init__(self, max_rows: int, device: torch.device) -> None:
        def zeros(dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(max_rows, dtype=dtype, device=device)

        self.vectors = {
            "temperature": zeros(torch.float32),
            "seeds": zeros(torch.int64),
            "positions": zeros(torch.int64),
            "top_k": zeros(torch.int32),
            "top_p": zeros(torch.float32),
            "min_p": zeros(torch.float32),
        }

    def gather(
        self, input_batch: "InputBatch", states: "SamplingStates", num_padded: int | None = None
    ) -> None:
        """Fill the first rows from a batch; rows from its end up to ``num_padded`` are greedy."""
        num_rows = input_batch.logits_indices.shape[0]
        num_padded = num_padded or num_rows
        _gather_kernel[(triton.cdiv(num_padded, _BLOCK),)](
            slot_ptr=input_batch.expanded_idx_mapping,
            logits_indices_ptr=input_batch.logits_indices,
            positions_ptr=input_batch.positions,
            temperature_ptr=states.temperature.gpu,
            seeds_ptr=states.seeds.gpu,
            top_k_ptr=states.top_k.gpu,
            top_p_ptr=states.top_p.gpu,
            min_p_ptr=states.min_p.gpu,
            **{f"out_{name}_ptr": vector for name, vector in self.vectors.items()},
            num_rows=num_rows,
            num_padded=num_padded,
            BLOCK=_BLOCK,
        )

    def rows(self, steering: Steering, filters: frozenset[str]) -> RowParameters:
        """As many rows as are steered, with all filters unless none is used.

        Args:
            filters: names of those that some row may use, and ``log_beta`` likewise.
        """
        alpha, log_beta = steering.alpha, steering.plausibility.log_beta
        vectors = {name: vector[: alpha.shape[0]] for name, vector in self.vectors.items()}
        if filters.isdisjoint(FILTERS):
            for name in FILTERS:
                del vectors[name]
        return RowParameters(alpha=alpha, log_beta=log_beta, **vectors, used=filters)
