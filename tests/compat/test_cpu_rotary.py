"""vLLM's rotary embedding on a CPU, and our cure of it."""

import pytest
import torch

TOKENS, HEADS, SIZE = 5, 4, 32


def tensors() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(TOKENS, HEADS, SIZE, generator=generator)
    key = torch.randn(TOKENS, 1, SIZE, generator=generator)
    return torch.arange(TOKENS), query, key


@pytest.fixture
def rotary():
    from vllm.config import CompilationConfig, VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

    with set_current_vllm_config(VllmConfig(compilation_config=CompilationConfig(mode=0))):
        return RotaryEmbedding(SIZE, SIZE, 64, 10000.0, True, torch.float32)


def test_the_kernel_is_wrong_for_queries_by_head(rotary):
    """When this fails, vLLM's kernel is right, and ``composite/cpu_rotary.py`` may go."""
    positions, query, key = tensors()
    right, _ = rotary.forward_cpu(positions, query.flatten(1).clone(), key.flatten(1).clone())
    wrong, _ = rotary.forward_cpu(positions, query.clone(), key.clone())
    assert not torch.allclose(right.view(query.shape), wrong)


@pytest.mark.parametrize("by_head", [True, False])
def test_members_rotate_rightly(rotary, by_head):
    from proxy_vllm.composite.cpu_rotary import rotate_flat

    assert rotary._forward_method == rotary.forward_cpu
    rotate_flat(torch.nn.ModuleList([rotary]))
    assert rotary._forward_method != rotary.forward_cpu
    positions, query, key = tensors()
    want = rotary.forward_native(positions, query.clone(), key.clone())
    wide = torch.zeros(TOKENS, HEADS, SIZE + 8)
    wide[..., 8:] = query
    view = wide[..., 8:] if by_head else query.flatten(1)  # a part of a row, as DeepSeek's
    got = rotary(positions, view, key if by_head else key.flatten(1))
    for result, expected in zip(got, want):
        torch.testing.assert_close(result.view(expected.shape), expected)
    torch.testing.assert_close(view.reshape(query.shape), want[0])  # in place
