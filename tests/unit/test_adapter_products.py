"""An adapter's products on a CPU, against matrices row by row; rows without one stay untouched."""

from types import SimpleNamespace

import pytest
import torch
from vllm.config import LoRAConfig
from vllm.lora.layers import LoRAMapping

from proxy_vllm.adapters.cpu_products import ProductsByAdapter, ProductsOfLayer

WIDTHS = (6, 4, 4)
SLOTS, RANK, WIDTH = 2, 8, 16


def shared() -> ProductsByAdapter:
    config = LoRAConfig(max_loras=SLOTS, max_lora_rank=RANK)
    return ProductsByAdapter(256, max_batches=256, device=torch.device("cpu"), lora_config=config)


def stacked(*shape: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    return tuple(torch.zeros(SLOTS, 1, *own, dtype=dtype) for own in shape)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("least", [0, 1])  # the second: every row has an adapter
@pytest.mark.parametrize("tokens", [1, 9, 200])
@pytest.mark.parametrize("way", ["eager", "compiled"])
def test_each_row_gets_its_own_adapters_product(way, tokens, least, dtype, tolerance):
    generator = torch.Generator().manual_seed(tokens)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    products = shared()
    # As vLLM's: stacks of zeros, into which adapters are written.
    layer = SimpleNamespace(
        lora_a_stacked=stacked(*[(RANK, WIDTH)] * 3, dtype=dtype),
        lora_b_stacked=stacked(*[(n, RANK) for n in WIDTHS], dtype=dtype),
    )
    own = ProductsOfLayer(products, layer)
    for stack in (*layer.lora_a_stacked, *layer.lora_b_stacked):
        stack.copy_(drawn(*stack.shape))
    a, b = layer.lora_a_stacked, layer.lora_b_stacked
    # Every slot is taken, the last one too, which a row of index -1 would find.
    ids = tuple(torch.randint(least, 3, (tokens,), generator=generator).tolist())
    slots = [2, 1]
    # Rows of a step before, longer than this one, leave nothing behind.
    for rows in ((1,) * 256, ids):
        products.update_metadata(LoRAMapping(rows, rows, is_prefill=True), slots, 3, 100)
    x, y = drawn(tokens, WIDTH), drawn(tokens, sum(WIDTHS))
    before = y.clone()

    def add(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        own.add_lora_linear(y, x, a, b, 1.0, WIDTHS)
        return y

    if way == "compiled":
        torch._dynamo.reset()
        add = torch.compile(add, dynamic=True, backend="aot_eager", fullgraph=True)
    y = add(y, x)
    for row, adapter in enumerate(ids):
        if not adapter:
            assert torch.equal(y[row], before[row])
            continue
        slot = slots.index(adapter)
        pairs = [(a_[slot, 0].double(), b_[slot, 0].double()) for a_, b_ in zip(a, b)]
        change = torch.cat([x[row].double() @ a_.T @ b_.T for a_, b_ in pairs])
        want = before[row].double() + change
        assert torch.allclose(y[row].double(), want, rtol=tolerance, atol=tolerance)
