"""Random LoRA adapters in PEFT's file format, and small models into which they are merged."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


def make_adapter(
    folder: Path,
    model: str,
    *,
    seed: int = 0,
    rank: int = 4,
    scale: float = 2.0,
    targets: Sequence[str] = (*ATTENTION, *MLP),
    **config: object,
) -> str:
    """Write an adapter of a model's linear layers (and tables) of these names.

    Args:
        model: a folder with a config.json at least.
        scale: ``lora_alpha / rank``.
        config: other fields of adapter_config.json.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    for name, module in shapes.named_modules():
        if name.rpartition(".")[2] not in targets:
            continue
        rows, columns = module.weight.shape
        halves = ("lora_A.weight", "lora_B.weight")
        if isinstance(module, torch.nn.Embedding):
            # A table's adapter is applied the other way round.
            halves, rows, columns = ("lora_embedding_A", "lora_embedding_B"), columns, rows
        for half, shape in zip(halves, ((rank, columns), (rows, rank))):
            drawn = torch.randn(shape, generator=generator) * 0.3
            tensors[f"base_model.model.{name}.{half}"] = drawn
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model,
        "r": rank,
        "lora_alpha": scale * rank,
        "target_modules": list(targets),
        "bias": "none",
        **config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return str(folder)


def merge(folder: Path, model: str, adapter: str) -> str:
    """Write the model with an adapter added to its weights, which is what the adapter means."""
    settings = json.loads((Path(adapter) / "adapter_config.json").read_text())
    tensors = load_file(Path(adapter) / "adapter_model.safetensors")
    merged = AutoModelForCausalLM.from_pretrained(model)
    scale = settings["lora_alpha"] / settings["r"]
    with torch.no_grad():
        for name, module in merged.named_modules():
            prefix = f"base_model.model.{name}."
            if (a := tensors.get(f"{prefix}lora_A.weight")) is not None:
                module.weight += scale * tensors[f"{prefix}lora_B.weight"] @ a
            if (a := tensors.get(f"{prefix}lora_embedding_A")) is not None:
                module.weight += scale * (tensors[f"{prefix}lora_embedding_B"] @ a).T
    merged.save_pretrained(folder)
    return str(folder)
