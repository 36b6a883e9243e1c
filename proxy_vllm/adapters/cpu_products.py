"""An adapter's products on a CPU.

vLLM's own (0.32.0) take row -1 of a table, its last slot, for rows without an adapter, which then
get another request's; they copy an adapter's matrices once for each token; and their Python numbers
become constants of a compiled graph. Here each adapter of a step is one product, and rows of others
add zeros or are left out. Compiled members trace the product of all slots; where that would be much
more than a step needs, and in eager ones, it is an operator that knows the adapters of the step.
"""

from typing import Any
from weakref import WeakValueDictionary

import torch
from vllm.config import CompilationMode, LoRAConfig, VllmConfig
from vllm.lora.layers import LoRAMapping
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.utils.torch_utils import direct_register_custom_op

# Up to so many rows of a step, all are multiplied by each adapter, other rows as zeros: that costs
# less than to pick rows and to put them back, and each matrix is read once either way.
_FEW_ROWS = 64
# Up to so many ranks of all slots together, compiled members multiply by every slot.
_TRACED_RANKS = 256


def compile_beside_adapters(vllm_config: VllmConfig) -> None:
    """Compile the members of an engine with adapters, where it would compile them without.

    vLLM compiles nothing on a CPU beside adapters (0.32.0), whose products it could not trace.
    What else it chooses for an engine that it compiles tells that this is one.
    """
    compilation = vllm_config.compilation_config
    if vllm_config.lora_config and "cpp.dynamic_threads" in compilation.inductor_compile_config:
        compilation.mode = CompilationMode.DYNAMO_TRACE_ONCE


class ProductsByAdapter(PunicaWrapperCPU):
    """vLLM's interface of a step's adapters, for layers that are not sharded along the rank."""

    def __init__(
        self, max_num_batched_tokens: int, *args: Any, lora_config: LoRAConfig, **kwargs: Any
    ) -> None:
        super().__init__(max_num_batched_tokens, *args, **kwargs)
        # Which slot's adapter each row of a step has: 1 there, 0 elsewhere.
        self.mask = torch.zeros(max_num_batched_tokens, lora_config.max_loras)
        self.num_rows = 0
        self.rows_of_slot: dict[int, torch.Tensor] = {}  # of slots that the step has
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
        ids = mapping.index_mapping  # of each row's adapter; 0 for none
        slots = torch.tensor([lora_index_to_id.index(i) if i > 0 else -1 for i in ids])
        found = slots[slots >= 0].unique().tolist()
        self.num_rows = len(ids)
        self.rows_of_slot = {slot: (slots == slot).nonzero()[:, 0] for slot in found}
        self.mask.zero_()
        for slot, rows in self.rows_of_slot.items():
            self.mask[rows, slot] = 1

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


class ProductsOfLayer:
    """The same for one linear layer, whose matrices are laid out for one product of all slots.

    Args:
        shared: of the step.
        layer: adapted by vLLM; its stacked matrices become views of what is here.
    """

    def __init__(self, shared: ProductsByAdapter, layer: Any) -> None:
        a, b = layer.lora_a_stacked, layer.lora_b_stacked
        slots, _, rank, width = a[0].shape
        self.shared, self.traced = shared, slots * rank <= _TRACED_RANKS
        self.slots, self.rank = slots, rank
        self.a = torch.zeros(len(a) * slots * rank, width, dtype=a[0].dtype)
        self.b = [torch.zeros(slots * rank, own.shape[2], dtype=own.dtype) for own in b]
        # vLLM writes an adapter into these, by the slot that it gets.
        layer.lora_a_stacked = tuple(self.a.view(len(a), slots, 1, rank, width))
        layer.lora_b_stacked = tuple(
            own.view(slots, 1, rank, own.shape[1]).transpose(2, 3) for own in self.b
        )

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        **kwargs: Any,
    ) -> None:
        """As ``ProductsByAdapter``; a compiled layer multiplies by every slot, and masks rows."""
        whole = all(b.shape[1] == width for b, width in zip(self.b, output_slices))
        if not (self.traced and whole and torch.compiler.is_compiling()):
            self.shared.add_lora_linear(
                y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, **kwargs
            )
            return
        x = x.reshape(-1, x.shape[-1]).float()
        inner = (x @ self.a.float().T).view(-1, len(self.b), self.slots, self.rank)
        inner = inner * self.shared.mask[: x.shape[0], None, :, None]
        parts = [inner[:, i].flatten(1) @ b.float() for i, b in enumerate(self.b)]
        y.view(-1, y.shape[-1]).add_(torch.cat(parts, dim=1))


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
    y, x = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
    step = _OWNERS[owner.data_ptr()]
    for slot, rows in step.rows_of_slot.items():
        every = len(rows) == len(y)
        masked = not every and len(y) == step.num_rows <= _FEW_ROWS
        given = x if every else x * step.mask[: len(y), slot, None] if masked else x[rows]
        given, start = given.float(), 0
        for i, (b, width) in enumerate(zip(lora_b, slices)):
            inner = given @ lora_a[i][slot, 0].float().T if lora_a else given
            weight = b[slot, 0].float().T  # [r, n], n up to width
            part = y[:, start : start + weight.shape[1]]
            if not every and not masked:
                added = part[rows].float().addmm_(inner, weight)
                part.index_copy_(0, rows, added.to(y.dtype))
            elif y.dtype == torch.float32:
                part.addmm_(inner, weight)
            else:
                part += inner @ weight
            start += width


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
