"""Refuse model folders that vLLM would only find broken in a worker, minutes later."""

import json
import zipfile
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

from proxy_vllm.errors import UserError, one_line

T = TypeVar("T")

# Load formats that read weight files from the model's folder, and what they look for there.
FILE_FORMATS = ("auto", "hf", "safetensors", "fastsafetensors", "mistral", "npcache", "pt")
_WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt")
_INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_MOST_IN_A_LINE = 400


def reading(role: str, name: str, read: Callable[[], T]) -> T:
    """Run ``read``; turn whatever it raises into one line that names the member."""
    try:
        return read()
    except UserError:
        raise
    except Exception as error:
        reason = one_line(error)
        if len(reason) > _MOST_IN_A_LINE:
            reason = reason[:_MOST_IN_A_LINE] + " ..."
        if _for_want_of_torchvision(reason):
            reason += (
                ". Models that also see images need torchvision, which is not installed, for their"
                " text too: install the build that belongs to this PyTorch"
            )
        raise UserError(f"{role} {name!r} cannot be used: {reason}") from error


def _for_want_of_torchvision(reason: str) -> bool:
    """Whether what vLLM says may come from that; of a class it only says that it cannot load it."""
    said = "torchvision" in reason.lower() or "failed to be inspected" in reason
    return said and find_spec("torchvision") is None


def is_folder_name(name: str) -> bool:
    """Whether a name cannot be one of the hub."""
    return Path(name).is_absolute() or name.startswith((".", "~")) or Path(name).exists()


def check_folder(role: str, folder: Path) -> None:
    """Refuse what is no folder with a model's configuration, and say what it is."""
    who = f"{role} {str(folder)!r}"
    if not folder.exists():
        raise UserError(f"{who}: no such folder")
    if folder.is_file():
        raise UserError(
            f"{who} is a file: name the model's folder, with config.json and weights in"
            " safetensors or PyTorch's format (GGUF has to be converted)"
        )
    if not any((folder / file).exists() for file in ("config.json", "params.json")):
        raise UserError(f"{who}: {what_it_is([p.name for p in folder.iterdir()], folder)}")


def what_it_is(files: Iterable[str], folder: Path | None = None) -> str:
    """What a place without a model's configuration holds, and the way out."""
    names = set(files)
    if "adapter_config.json" in names:
        of = ""
        if folder is not None:
            try:
                config = json.loads((folder / "adapter_config.json").read_text())
                of = f" of {config['base_model_name_or_path']!r}"
            except (OSError, ValueError, KeyError, TypeError):
                pass
        return (
            f"this is a LoRA adapter{of}, no whole model: name it with --enable-lora"
            " --lora-modules NAME=PATH and its model as --antiexpert, or merge it (PEFT's"
            " `merge_and_unload`), save that with its tokenizer, and name the new folder"
        )
    if any(name.endswith(".gguf") for name in names):
        return (
            "this holds GGUF files and no config.json: name the model that they were made from, in"
            " safetensors (Transformers' `from_pretrained(..., gguf_file=...)` converts one)"
        )
    if folder is not None:
        inside = [*folder.glob("*/config.json"), *folder.glob("snapshots/*/config.json")]
        if inside:
            return f"no config.json, but one in {str(inside[0].parent)!r}: name that folder"
    return "no config.json: this is no model in Hugging Face's format"


def check_weights(role: str, folder: str, load_format: str) -> None:
    """Refuse a local model folder whose weights are missing or cut short.

    vLLM finds that out in a worker, after minutes for a large base. Folders of other load formats
    and models of the hub are left to vLLM.
    """
    root = Path(folder)
    if load_format not in FILE_FORMATS or not root.is_dir():
        return
    found = [file for pattern in _WEIGHT_FILES for file in root.glob(pattern)]
    if not any(root.glob("consolidated*.safetensors")):
        for index in _INDEX_FILES:
            # vLLM reads PyTorch's files where there are no safetensors, or where it is told to.
            replaced = index.startswith("pytorch") and any(root.glob("*.safetensors"))
            if (root / index).exists() and (not replaced or load_format == "pt"):
                _check_shards(role, root / index, {file.name for file in found})
    if not found:
        raise UserError(
            f"{role} {folder!r}: the folder holds no weights ({', '.join(_WEIGHT_FILES)})"
        )
    for file in found:
        if not _is_whole(file):
            raise UserError(
                f"{role} {folder!r}: {file.name} is cut short or no weight file:"
                " download it again (a Git LFS pointer wants `git lfs pull`)"
            )


def _check_shards(role: str, index: Path, found: set[str]) -> None:
    folder = str(index.parent)
    shards = reading(
        role, folder, lambda: set(json.loads(index.read_text())["weight_map"].values())
    )
    if missing := sorted(shards - found):
        raise UserError(
            f"{role} {folder!r}: {len(missing)} of {len(shards)} weight files are missing,"
            f" first {missing[0]}: complete the download"
        )


def _is_whole(file: Path) -> bool:
    """Whether a file ends where its own table of contents says."""
    from safetensors import SafetensorError, safe_open

    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="np"):
                return True
        except SafetensorError:
            return False
    with file.open("rb") as opened:
        start = opened.read(len(b"version https://git-lfs"))
    if start.startswith(b"PK"):  # a zip archive, as PyTorch writes; its table stands at the end
        return zipfile.is_zipfile(file)
    return start != b"version https://git-lfs" and bool(start)
