"""An adapter's products on a CPU.

vLLM's own (0.32.0) take row -1 of a table, its last slot, for rows without an adapter, which then
get another request's; they copy an adapter's matrices once for each token; and their Python numbers
become constants of a compiled graph. Here the rows of each adapter are one product, rows without an
adapter are not touched, and Dynamo sees one opaque operator.
"""

from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import torch
from vllm.lora.layers import LoRAMapping
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.utils.torch_utils import direct_register_custom_op

# Up to so many rows, copies of their matrices cost less than a product for each adapter.
_FEW_ROWS = 64


@dataclass
class Rows:
    """The rows of a step that have an adapter."""

    rows: torch.Tensor  # [n]
    slots: torch.Tensor  # [n], of their adapters
    groups: list[tuple[int, torch.Tensor]]  # rows of each slot

    @classmethod
    def of(cls, ids: tuple[int, ...], slots: list[int | None]) -> "Rows":
        """From the adapter of each row, 0 for none, and the adapter in each slot."""
        by_row = [slots.index(adapter) if adapter > 0 else -1 for adapter in ids]
        every = torch.tensor(by_row, dtype=torch.int64)
        rows = (every >= 0).nonzero()[:, 0]
        found = sorted(set(by_row) - {-1})
        return cls(rows, every[rows], [(s, (every == s).nonzero()[:, 0]) for s in found])


class ProductsByAdapter(PunicaWrapperCPU):
    """vLLM's interface of a step's adapters, for layers that are not sharded along the rank."""

    rows: Rows | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _OWNERS[self._token_lora_indices.data_ptr()] = self

    def update_metadata(
        self,
        mapping: LoRAMapping,
        lora_index_to_id: list[int | None],
        max_loras: int,
        vocab_size: int,
        **kwargs: Any,
    ) -> None:
        super().update_metadata(mapping, lora_index_to_id, max_loras, vocab_size, **kwargs)
        self.rows = Rows.of(mapping.index_mapping, lora_index_to_id)

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
            y,
            x,
            list(lora_a_stacked),
            list(lora_b_stacked),
            list(output_slices),
            self._token_lora_indices,
        )

    def add_lora_embedding(
        self,
        y: torch.Tensor,  # [T, d], changed in place
        x: torch.Tensor,  # [T, r], rows of A
        lora_b_stacked: torch.Tensor,  # [slots, 1, d, r]
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        torch.ops.vllm.proxy_add_adapters(
            y, x, [], [lora_b_stacked], [y.shape[-1]], self._token_lora_indices
        )


# By the address of the tensor that an operator is given, which tells engines of a process apart.
_OWNERS: "WeakValueDictionary[int, ProductsByAdapter]" = WeakValueDictionary()


def _proxy_add_adapters(
    y: torch.Tensor,
    x: torch.Tensor,
    lora_a: list[torch.Tensor],
    lora_b: list[torch.Tensor],
    slices: list[int],
    owner: torch.Tensor,
) -> None:
    """``y[rows] += x[rows] @ A.T @ B.T`` in float32 for each adapter, slice after slice."""
    found = _OWNERS[owner.data_ptr()].rows
    if found is None or not len(found.rows):
        return
    y, x = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
    few = len(found.rows) <= _FEW_ROWS
    parts = [(found.slots, found.rows)] if few else found.groups
    for slot, rows in parts:
        whole = len(rows) == len(y)
        own, start = (x if whole else x[rows]).float(), 0
        for i, (b, width) in enumerate(zip(lora_b, slices)):
            inner = _product(own, lora_a[i], slot) if lora_a else own
            change = _product(inner, b, slot)
            part = y[:, start : start + change.shape[1]]
            if whole:
                part += change
            else:
                part.index_copy_(0, rows, (part[rows].float() + change).to(y.dtype))
            start += width


def _product(
    x: torch.Tensor,  # [n, d] float32
    stacked: torch.Tensor,  # [slots, 1, m, d]
    slot: torch.Tensor | int,  # [n], or one for all rows
) -> torch.Tensor:  # [n, m] float32
    weight = stacked[slot, 0].float()
    if isinstance(slot, int):
        return x @ weight.T
    return torch.bmm(weight, x[:, :, None])[:, :, 0]


def _proxy_add_adapters_fake(
    y: torch.Tensor,
    x: torch.Tensor,
    lora_a: list[torch.Tensor],
    lora_b: list[torch.Tensor],
    slices: list[int],
    owner: torch.Tensor,
) -> None:
    return None


direct_register_custom_op(
    op_name="proxy_add_adapters",
    op_func=_proxy_add_adapters,
    mutates_args=["y"],
    fake_impl=_proxy_add_adapters_fake,
)
