"""vLLM's rotary embedding on a CPU, and our cure of it."""

import pytest
import torch

HEADS, SIZE = 4, 32


def tensors(tokens: int = 5) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(tokens, HEADS, SIZE, generator=generator)
    key = torch.randn(tokens, 1, SIZE, generator=generator)
    return torch.arange(tokens), query, key


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


@pytest.mark.parametrize("tokens", [5, 1])
@pytest.mark.parametrize("by_head", [True, False])
def test_members_rotate_rightly(rotary, by_head, tokens):
    from proxy_vllm.composite.cpu_rotary import rotate_flat

    assert rotary._forward_method == rotary.forward_cpu
    rotate_flat(torch.nn.ModuleList([rotary]))
    assert rotary._forward_method != rotary.forward_cpu
    positions, query, key = tensors(tokens)
    want = rotary.forward_native(positions, query.clone(), key.clone())
    views = []
    for given in (query, key):  # parts of a row, as DeepSeek's
        wide = torch.zeros(tokens, given.shape[1], SIZE + 8)
        wide[..., 8:] = given
        views.append(wide[..., 8:] if by_head else given.flatten(1))
    for result, view, expected in zip(rotary(positions, *views), views, want, strict=True):
        torch.testing.assert_close(result.view(expected.shape), expected)
        torch.testing.assert_close(view.reshape(expected.shape), expected)  # in place
