"""An adapter's products on a CPU.

vLLM's own (0.32.0) take row -1 of a table, its last slot, for rows without an adapter, which then
get another request's; they copy an adapter's matrices once for each token; and their Python numbers
become constants of a compiled graph. Here the rows of each adapter are one product, rows without an
adapter are not touched, and Dynamo sees one opaque operator.
"""

from typing import Any, ClassVar

import torch
from vllm.lora.layers import LoRAMapping
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.utils.torch_utils import direct_register_custom_op

# Rows of a step by the slot of their adapter.
Rows = list[tuple[int, torch.Tensor]]


class ProductsByAdapter(PunicaWrapperCPU):
    """vLLM's interface of a step's adapters, for layers that are not sharded along the rank."""

    # Tokens of the step that runs. An operator finds them here: a process has one expert.
    tokens: ClassVar[Rows] = []

    def update_metadata(
        self,
        mapping: LoRAMapping,
        lora_index_to_id: list[int | None],
        max_loras: int,
        vocab_size: int,
        **kwargs: Any,
    ) -> None:
        super().update_metadata(mapping, lora_index_to_id, max_loras, vocab_size, **kwargs)
        ProductsByAdapter.tokens = rows_by_slot(mapping.index_mapping, lora_index_to_id)

    def add_lora_linear(
        self,
        y: torch.Tensor,  # [T, sum of output_slices], changed in place
        x: torch.Tensor,  # [T, d]
        lora_a_stacked: tuple[torch.Tensor, ...],  # of [slots, 1, r, d]
        lora_b_stacked: tuple[torch.Tensor, ...],  # of [slots, 1, n, r]
        scale: float,
        output_slices: tuple[int, ...],
        *,
        buffer: Any = None,
        **kwargs: Any,
    ) -> None:
        torch.ops.vllm.proxy_add_adapters(
            y, x, list(lora_a_stacked), list(lora_b_stacked), list(output_slices)
        )

    def add_lora_embedding(
        self,
        y: torch.Tensor,  # [T, d], changed in place
        x: torch.Tensor,  # [T, r], rows of A
        lora_b_stacked: torch.Tensor,  # [slots, 1, d, r]
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        torch.ops.vllm.proxy_add_adapters(y, x, [], [lora_b_stacked], [y.shape[-1]])


def rows_by_slot(ids: tuple[int, ...], slots: list[int | None]) -> Rows:
    """Rows of each adapter that a step has, an id of 0 being none.

    Args:
        ids: the adapter of each row.
        slots: the adapter in each slot.
    """
    every = torch.tensor(ids, dtype=torch.int64)
    return [
        (slots.index(adapter), (every == adapter).nonzero()[:, 0])
        for adapter in dict.fromkeys(ids)
        if adapter > 0
    ]


def _proxy_add_adapters(
    y: torch.Tensor,
    x: torch.Tensor,
    lora_a: list[torch.Tensor],
    lora_b: list[torch.Tensor],
    slices: list[int],
) -> None:
    """``y[rows] += x[rows] @ A.T @ B.T`` in float32 for each adapter, slice after slice."""
    y, x = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
    for slot, rows in ProductsByAdapter.tokens:
        own, start = x[rows].float(), 0
        for i, (b, width) in enumerate(zip(lora_b, slices)):
            inner = own @ lora_a[i][slot, 0].float().T if lora_a else own
            change = inner @ b[slot, 0].float().T
            part = y[:, start : start + change.shape[1]]
            part.index_copy_(0, rows, (part[rows].float() + change).to(y.dtype))
            start += width


def _proxy_add_adapters_fake(
    y: torch.Tensor,
    x: torch.Tensor,
    lora_a: list[torch.Tensor],
    lora_b: list[torch.Tensor],
    slices: list[int],
) -> None:
    return None


direct_register_custom_op(
    op_name="proxy_add_adapters",
    op_func=_proxy_add_adapters,
    mutates_args=["y"],
    fake_impl=_proxy_add_adapters_fake,
)
