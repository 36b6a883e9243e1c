"""Which LoRA adapters an engine can run: one line that names the culprit for any other.

vLLM refuses some while it loads them, and takes others without a word that it then applies in part:
narrower matrices, layers that are not adapted, embeddings of the adapter's own.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from proxy_vllm.errors import UserError, one_line

if TYPE_CHECKING:
    from vllm.config import ModelConfig
    from vllm.config.lora import LoRAConfig

_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_OTHER_WEIGHTS = ("adapter_model.bin", "adapter_model.pt")

LM_HEAD = (
    "and vLLM counts a head's rows by request, as drafts and log-probabilities of prompts do not:"
    " merge the adapter into the small model, and give the result as --expert"
)
_OWN_TABLE = (
    "it brings {} of its own, and vLLM would leave that out: merge the adapter into the small"
    " model, and give the result as --expert of a server of its own"
)

Shape = tuple[int, ...]


@dataclass(frozen=True)
class AdapterRules:
    """What an adapter of one small model may change, and by how much.

    Args:
        model: the small model's folder or hub name, for messages.
        layers: input and output size of each layer that can be adapted, by its name in
            Transformers' model; None where Transformers cannot build the model.
        lora: vLLM's limits.
        packed: vLLM's names of layers that hold several of the model's.
        renumbered: whether the rows of the model's tables have other numbers in the engine.
    """

    model: str
    layers: dict[str, tuple[int, int]] | None
    lora: "LoRAConfig"
    packed: dict[str, list[str]]
    renumbered: bool = False

    @classmethod
    def of(
        cls, config: "ModelConfig", lora: "LoRAConfig", renumbered: bool = False
    ) -> "AdapterRules":
        """The rules for adapters of the model of ``config``."""
        from vllm.model_executor.models import ModelRegistry

        kind, _ = ModelRegistry.resolve_model_cls(config.architectures, config)
        packed = dict(getattr(kind, "packed_modules_mapping", {}))
        return cls(config.model, _layers(config), lora, packed, renumbered)

    def check(self, name: str, path: str) -> None:
        """Raise ``UserError`` unless the adapter at ``path`` runs whole on this model."""
        from vllm.lora.utils import get_adapter_absolute_path

        folder = Path(get_adapter_absolute_path(path))
        try:
            shapes = self._check(folder)
        except UserError as error:
            raise UserError(f"adapter {name!r} ({path}): {error}") from None
        assert shapes

    def _check(self, folder: Path) -> dict[str, Shape]:
        config = _read_config(folder)
        helper = self._check_config(config)
        shapes = dict(_read_shapes(folder))
        halves: dict[str, dict[str, Shape]] = {}
        for tensor, shape in shapes.items():
            if (place := self._place(tensor, shape, config)) is not None:
                layer, half = place
                halves.setdefault(layer, {})[half] = shape
                if "lora_embedding" in tensor:
                    halves[layer]["embedding"] = shape
        if not halves:
            raise UserError("it holds no LoRA weights")
        for layer, own in halves.items():
            self._check_layer(layer, own, helper)
        return shapes

    def _check_config(self, config: dict[str, Any]) -> Any:
        from vllm.config.lora import MaxLoRARanks
        from vllm.lora.peft_helper import PEFTHelper

        if (kind := config.get("peft_type", "LORA")) != "LORA":
            raise UserError(f"it is of type {kind}, and vLLM runs LoRA alone")
        try:
            helper = PEFTHelper.from_dict(config)
            helper.validate_legal(self.lora)
        except (ValueError, TypeError) as error:
            reason = one_line(error)
            rank = max([config.get("r", 0), *(config.get("rank_pattern") or {}).values()])
            if "max_lora_rank" in reason:
                fits = [size for size in get_args(MaxLoRARanks) if size >= rank]
                way = f"start with --max-lora-rank {fits[0]}" if fits else "vLLM runs none larger"
                reason = f"rank {rank} is above the server's {self.lora.max_lora_rank}: {way}"
            raise UserError(reason) from None
        return helper

    def _place(self, tensor: str, shape: Shape, config: dict[str, Any]) -> tuple[str, str] | None:
        """Layer and half (A or B) of a tensor; None for one that vLLM rightly leaves out."""
        from vllm.lora.utils import is_base_embedding_weights, parse_fine_tuned_lora_name

        if is_base_embedding_weights(tensor):
            # PEFT saves a table that has an adapter beside it. It is the small model's own, unless
            # tokens were added to it.
            if self._is_own_table(tensor, shape):
                return None
            raise UserError(_OWN_TABLE.format(tensor))
        try:
            layer, is_a = parse_fine_tuned_lora_name(tensor)
        except ValueError:
            table = ".embed_tokens." in tensor or ".lm_head." in tensor
            text = _OWN_TABLE if table else "it holds {}, which is no matrix of LoRA"
            raise UserError(text.format(tensor)) from None
        if layer in (config.get("modules_to_save") or ()):
            raise UserError(f"it replaces {layer} as a whole, which vLLM does not")
        return layer, "A" if is_a else "B"

    def _is_own_table(self, tensor: str, shape: Shape) -> bool:
        name = tensor.removeprefix("base_model.model.").removesuffix(".base_layer.weight")
        known = (self.layers or {}).get(name)
        return known is None or sorted(known) == sorted(shape)

    def _check_layer(self, layer: str, own: dict[str, Shape], helper: Any) -> None:
        from vllm.lora.utils import is_in_target_modules

        if not {"A", "B"} <= own.keys():
            raise UserError(f"{layer} has but one of the two matrices of LoRA")
        targets = self.lora.target_modules
        last = layer.rpartition(".")[2]
        if last == "lm_head":
            raise UserError(f"it changes lm_head, {LM_HEAD}")
        if self.renumbered and "embedding" in own:
            raise UserError(f"it changes {layer}, whose rows --tokenizer-map has moved")
        if not is_in_target_modules(layer, targets, self.packed):
            raise UserError(f"it changes {layer}, which --lora-target-modules leaves out")
        if self.layers is None or ".experts" in layer:
            return  # vLLM alone knows
        if layer not in self.layers:
            raise UserError(f"it changes {layer}, which {self.model!r} does not have")
        (rank, *width), (height, *ranks) = own["A"], own["B"]
        if len(width) != 1 or ranks != [rank]:
            raise UserError(f"{layer} has matrices of {own['A']} and {own['B']}, no pair of LoRA")
        if rank != helper.get_rank_and_scaling(layer)[0]:
            raise UserError(f"{layer} has rank {rank}, and {_CONFIG} another")
        if (width[0], height) != self.layers[layer]:
            inputs, outputs = self.layers[layer]
            raise UserError(
                f"it changes {layer} from {width[0]} to {height}, which in {self.model!r} goes from"
                f" {inputs} to {outputs}: it was made for another model"
            )


def _layers(config: "ModelConfig") -> dict[str, tuple[int, int]] | None:
    """Input and output size of each layer, of a model without storage; None if it has other names.

    A model that is the text part of another has other names there.
    """
    import torch.nn as nn
    from transformers.pytorch_utils import Conv1D

    from proxy_vllm.plan.decoder import build

    outer = config.hf_config
    if config.hf_text_config is not outer:
        return None
    try:
        model = build(config.model, outer)
    except UserError:
        return None
    if type(model).__name__ not in (getattr(outer, "architectures", None) or ()):
        return None
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            found[name] = (module.in_features, module.out_features)
        elif isinstance(module, Conv1D):
            found[name] = (module.nx, module.nf)
        elif isinstance(module, nn.Embedding):
            found[name] = (module.num_embeddings, module.embedding_dim)
    return found


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise UserError("there is no such folder")
    try:
        config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"it has no {_CONFIG}: an adapter is a folder in PEFT's format") from None
    except (OSError, ValueError) as error:
        raise UserError(f"its {_CONFIG} cannot be read: {one_line(error)}") from None
    if not isinstance(config, dict):
        raise UserError(f"its {_CONFIG} is no JSON object")
    return config


def _read_shapes(folder: Path) -> Iterator[tuple[str, Shape]]:
    """Names and shapes of an adapter's tensors."""
    import torch
    from safetensors import safe_open

    path = folder / _WEIGHTS
    try:
        if path.is_file():
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (it is no dictionary)
                    yield name, tuple(file.get_slice(name).get_shape())
            return
        for other in _OTHER_WEIGHTS:
            if (folder / other).is_file():
                tensors = torch.load(folder / other, map_location="meta", weights_only=True)
                yield from ((name, tuple(tensor.shape)) for name, tensor in tensors.items())
                return
    except Exception as error:  # each library has errors of its own for a broken file
        raise UserError(f"its weights cannot be read: {one_line(error)}") from None
    raise UserError(f"it has no {_WEIGHTS}")
