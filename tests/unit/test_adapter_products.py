"""An adapter's products on a CPU, against matrices row by row; rows without one stay untouched."""

import pytest
import torch
from vllm.config import LoRAConfig
from vllm.lora.layers import LoRAMapping

from proxy_vllm.adapters.cpu_products import ProductsByAdapter


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("least", [0, 1])  # the second: every row has an adapter
@pytest.mark.parametrize("tokens", [1, 9, 200])
def test_each_row_gets_its_own_adapters_product(tokens, least, dtype, tolerance):
    generator = torch.Generator().manual_seed(tokens)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    device, config = torch.device("cpu"), LoRAConfig(max_loras=2, max_lora_rank=8)
    products = ProductsByAdapter(256, max_batches=256, device=device, lora_config=config)
    # Every slot is taken, the last one too, which a row of index -1 would find.
    ids = tuple(torch.randint(least, 3, (tokens,), generator=generator).tolist())
    slots = [2, 1]
    products.update_metadata(LoRAMapping(ids, ids, is_prefill=True), slots, 3, 100)
    widths = (6, 4, 4)
    a = tuple(drawn(2, 1, 8, 16) for _ in widths)
    b = tuple(drawn(2, 1, width, 8) for width in widths)
    x, y = drawn(tokens, 16), drawn(tokens, sum(widths))
    before = y.clone()
    products.add_lora_linear(y, x, a, b, 1.0, widths)
    for row, adapter in enumerate(ids):
        if not adapter:
            assert torch.equal(y[row], before[row])
            continue
        slot = slots.index(adapter)
        pairs = [(a_[slot, 0].double(), b_[slot, 0].double()) for a_, b_ in zip(a, b)]
        change = torch.cat([x[row].double() @ a_.T @ b_.T for a_, b_ in pairs])
        want = before[row].double() + change
        assert torch.allclose(y[row].double(), want, rtol=tolerance, atol=tolerance)
