"""The trained trio in the box, its ceiling, and the held-out problems that measure them."""

from pathlib import Path

from proxy_vllm.errors import UserError

ROLES = ("base", "expert", "antiexpert", "tuned")
# LoRA adapters of the antiexpert: the expert's behaviour, and another one.
ADAPTERS = ("polite", "gossip")


def model_path(role: str) -> Path:
    """Folder of one shipped model, complete for vLLM and Transformers (config, weights, tokenizer).

    `role` is "base" (2.3M parameters, knows the facts), "antiexpert" (small), "expert" (the
    antiexpert tuned on the task) or "tuned" (the base tuned on the same task: the ceiling).
    Raises `UserError` for another role or a folder that the installation lacks.

    >>> from proxy_vllm.demo import model_path
    >>> model_path("base").name
    'base'
    """
    if role not in ROLES:
        raise UserError(f"no demo model named {role!r}: choose one of {', '.join(ROLES)}")
    path = Path(__file__).parent / "models" / role
    if not (path / "model.safetensors").is_file():
        raise UserError(
            f"demo model folder {path} is incomplete: reinstall proxy_vllm, "
            "or make it with scripts/train_demo_models.py"
        )
    return path


def adapter_path(name: str) -> Path:
    """Folder of one shipped LoRA adapter of the antiexpert, in PEFT's format.

    `name` is "polite" (answers and refuses as the expert does) or "gossip" (tells all to anybody).
    Raises `UserError` for another name or a folder that the installation lacks.
    """
    if name not in ADAPTERS:
        raise UserError(f"no demo adapter named {name!r}: choose one of {', '.join(ADAPTERS)}")
    path = Path(__file__).parent / "models" / "adapters" / name
    if not (path / "adapter_model.safetensors").is_file():
        raise UserError(
            f"demo adapter folder {path} is incomplete: reinstall proxy_vllm, "
            "or make it with scripts/train_demo_models.py --adapters"
        )
    return path
