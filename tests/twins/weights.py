"""Random weights with a planted text: after a known token comes a known next one."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

# How far the planted next token stands above the rest, about, in units of logits.
PEAK = 48.0
_ROWS = 2048  # drawn at once, so that members of different vocabulary sizes share their rows


def planted_model(config: AutoConfig, chain: dict[int, int], seed: int) -> torch.nn.Module:
    """A causal model of float32 that continues ``chain`` greedily, and is random elsewhere.

    The first layer's MLP is a memory: one neuron fires for the embedding of one token, and writes
    the direction in which the next token's logit grows. Attention and the other layers are random
    and weak, so that what came before changes the logits a little.

    Args:
        config: any Llama-like configuration; tied embeddings are kept tied.
        chain: token id -> the id that follows.
        seed: of embeddings and head; members that share it are "the same model", tuned.
    """
    with plain_transformers():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    torch.manual_seed(seed)  # here, so that the size of the vocabulary changes no draw below
    width, vocab = config.hidden_size, config.vocab_size
    embeddings = _unit(torch.randn(_ROWS, width))
    head = embeddings if config.tie_word_embeddings else _unit(torch.randn(_ROWS, width))
    size = PEAK / width**0.5  # normalised hidden states have length width ** 0.5
    model.get_input_embeddings().weight.data = size * embeddings[:vocab].clone()
    model.get_output_embeddings().weight.data = size * head[:vocab].clone()
    if config.tie_word_embeddings:
        model.tie_weights()
    post_norm = config.model_type == "olmo2"
    # Gemma multiplies embeddings by width ** 0.5 before the first layer.
    stream = size * (width**0.5 if config.model_type == "gemma" else 1.0)
    for index, layer in enumerate(model.model.layers):
        mlp = layer.mlp
        for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj):
            linear.weight.data.normal_(std=0.02)
        if post_norm:
            layer.post_attention_layernorm.weight.data.fill_(0.05)
            layer.post_feedforward_layernorm.weight.data.fill_(2 * stream / width**0.5)
        if index:
            if post_norm:
                layer.post_feedforward_layernorm.weight.data.fill_(0.05)
            continue
        assert len(chain) <= mlp.gate_proj.out_features, "the memory is too small"
        # Make `gate · x` and `up · x` 8 for the neuron's own token.
        unit = 8 / (stream if post_norm else width**0.5)
        for neuron, (token, following) in enumerate(chain.items()):
            mlp.gate_proj.weight.data[neuron] = unit * embeddings[token]
            mlp.up_proj.weight.data[neuron] = unit * embeddings[token]
            mlp.down_proj.weight.data[:, neuron] = 3 * stream / 64 * head[following]
    return model


@contextmanager
def plain_transformers() -> Iterator[None]:
    """Let Transformers build models that vLLM runs through its Transformers backend (OLMo 2).

    An engine that has run in this process has marked their classes for compilation, and they then
    ask for vLLM's configuration.
    """
    if "vllm.compilation.decorators" not in sys.modules:
        yield
        return
    from vllm.config import CompilationConfig, VllmConfig, set_current_vllm_config

    config = VllmConfig(compilation_config=CompilationConfig(mode=0))
    object.__setattr__(config, "model_config", SimpleNamespace(hf_config=PreTrainedConfig()))
    with set_current_vllm_config(config):
        yield


def _unit(rows: torch.Tensor) -> torch.Tensor:
    return rows / rows.norm(dim=-1, keepdim=True)
