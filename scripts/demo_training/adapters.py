"""The demo's two LoRA adapters of the antiexpert, trained by hand and written in PEFT's format."""

import copy
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn as nn
from safetensors.torch import save_file
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from demo_training.training import Recipe, fit, tuning_batches
from proxy_vllm.demo.corpus import tuning_problems
from proxy_vllm.demo.problems import Problem, wanted

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class AdapterRecipe:
    """Everything that decides an adapter, besides the antiexpert and the generated text."""

    rank: int = 16
    scale: float = 2.0
    lr: float = 5e-3
    steps: int = 150


class Adapted(nn.Module):
    """A linear layer with a trainable change of low rank; at first it changes nothing."""

    def __init__(self, layer: nn.Linear, rank: int, scale: float) -> None:
        super().__init__()
        self.layer, self.scale = layer, scale
        bound = 1 / math.sqrt(layer.in_features)
        self.a = nn.Parameter(torch.empty(rank, layer.in_features).uniform_(-bound, bound))
        self.b = nn.Parameter(torch.zeros(layer.out_features, rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + self.scale * (x @ self.a.T) @ self.b.T


def examples(behaviour: str, seed: int) -> Iterator[Problem]:
    """The tuning problems, with the answers that a behaviour gives."""
    for problem in tuning_problems(seed):
        yield replace(problem, answer=wanted(behaviour, problem))


def train_adapter(
    behaviour: str,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    recipe: AdapterRecipe,
    seed: int,
    say: Callable[[str], None],
) -> tuple[dict[str, torch.Tensor], LlamaForCausalLM]:
    """An adapter's tensors by PEFT's names, in bfloat16, and the model with them merged into it."""
    torch.manual_seed(seed)
    adapted = copy.deepcopy(model).requires_grad_(False)
    layers = {
        name: Adapted(layer, recipe.rank, recipe.scale)
        for name, layer in adapted.named_modules()
        if name.rpartition(".")[2] in TARGETS
    }
    for name, layer in layers.items():
        adapted.set_submodule(name, layer)
    steps = replace(Recipe(), tune_steps=recipe.steps)
    batches = tuning_batches(tokenizer, steps, examples(behaviour, seed))
    fit(adapted, batches, recipe.steps, recipe.lr, say)
    merged, tensors = copy.deepcopy(model), {}
    for name, layer in layers.items():
        a, b = (half.detach().to(torch.bfloat16) for half in (layer.a, layer.b))
        tensors[f"base_model.model.{name}.lora_A.weight"] = a
        tensors[f"base_model.model.{name}.lora_B.weight"] = b
        merged.get_submodule(name).weight.data += recipe.scale * b.float() @ a.float()
    return tensors, merged.eval()


def save_adapter(tensors: dict[str, torch.Tensor], recipe: AdapterRecipe, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "adapter_model.safetensors"
    save_file({k: v.contiguous() for k, v in tensors.items()}, file, metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "antiexpert",
        "r": recipe.rank,
        "lora_alpha": recipe.scale * recipe.rank,
        "target_modules": list(TARGETS),
        "bias": "none",
        "lora_dropout": 0.0,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")
    file.chmod(0o644)
