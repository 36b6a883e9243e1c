"""Random tiny models on disk, of several architectures, with a shared tokenizer of V tokens."""

from collections.abc import Container
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)


def save_tokenizer(
    folder: Path,
    vocab_size: int,
    renamed: dict[int, str] | None = None,
    unnamed: Container[int] = (),
) -> None:
    """A word-level tokenizer: token i is ``w{i}``, and the ends of text are the first two ids."""
    names = {i: f"w{i}" for i in range(vocab_size)}
    names.update({0: "<pad>", 1: "</s>", 2: "user", 3: "assistant", **(renamed or {})})
    vocab = {name: i for i, name in names.items() if i not in unnamed}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<pad>",
        eos_token="</s>",
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)


def make_model(
    folder: Path,
    *,
    arch: str = "llama",
    seed: int = 0,
    vocab: int = 111,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 2,
    kv_heads: int | None = None,
    tied: bool = False,
    max_len: int = 512,
    dtype: torch.dtype = torch.float32,
    tokenizer_size: int | None = None,
    renamed: dict[int, str] | None = None,
    unnamed: Container[int] = (),
) -> str:
    """Write a random model and its tokenizer, and return the folder.

    Weights are drawn wide, so that logits differ clearly between tokens and greedy decoding does
    not hang on rounding.
    """
    torch.manual_seed(seed)
    common = {
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "initializer_range": 0.2,
    }
    if arch in ("llama", "qwen2"):
        config_cls, model_cls = {
            "llama": (LlamaConfig, LlamaForCausalLM),
            "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        }[arch]
        config = config_cls(
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads or heads,
            max_position_embeddings=max_len,
            **common,
        )
    elif arch == "gpt2":
        config, model_cls = (
            GPT2Config(n_embd=hidden, n_layer=layers, n_head=heads, n_positions=max_len, **common),
            GPT2LMHeadModel,
        )
    elif arch == "opt":
        config, model_cls = (
            OPTConfig(
                hidden_size=hidden,
                ffn_dim=2 * hidden,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                max_position_embeddings=max_len,
                word_embed_proj_dim=hidden,
                init_std=0.2,
                **{k: v for k, v in common.items() if k != "initializer_range"},
            ),
            OPTForCausalLM,
        )
    else:
        raise ValueError(arch)
    model = model_cls(config).to(dtype)
    model.generation_config.eos_token_id = 1
    model.save_pretrained(folder)
    save_tokenizer(folder, tokenizer_size or vocab, renamed, unnamed)
    return str(folder)


def make_trio(root: Path, **base_args) -> dict[str, str]:
    """A base and two smaller models of one shape that differ in their weights."""
    return {
        "model": make_model(root / "base", seed=1, **base_args),
        "expert": make_model(root / "expert", seed=2, heads=2, kv_heads=1, layers=1),
        "antiexpert": make_model(root / "antiexpert", seed=3, heads=2, kv_heads=1, layers=1),
    }


def make_methods_models(root: Path) -> dict[str, str]:
    """A base, an amateur of it with padding of its own, and an aligned model of its size."""
    small = {"heads": 1, "hidden": 32, "layers": 1}
    return {
        "base": make_model(root / "base", seed=1, tokenizer_size=105),
        "amateur": make_model(root / "amateur", seed=2, vocab=128, tokenizer_size=105, **small),
        "aligned": make_model(root / "aligned", seed=3, tokenizer_size=105),
    }
