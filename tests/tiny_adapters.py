"""A small model with adapters, each also merged into it: what the adapters have to mean."""

from pathlib import Path
from typing import Any

from adapter_files import ATTENTION, make_adapter, merge
from tiny_models import make_model


def make_adapted(root: Path) -> dict[str, Any]:
    """Folders of a base, a small model, three adapters of it, and the model with each merged."""
    base = make_model(root / "base", seed=1)
    plain = make_model(root / "small", seed=3, heads=2, kv_heads=1, layers=2)
    adapters = {
        "safety": make_adapter(root / "safety", plain, seed=1),
        "code": make_adapter(root / "code", plain, seed=2, rank=8, targets=ATTENTION),
        "terse": make_adapter(root / "terse", plain, seed=3, targets=("embed_tokens", "up_proj")),
    }
    merged = {name: merge(root / f"merged-{name}", plain, a) for name, a in adapters.items()}
    return {"base": base, "plain": plain, "adapters": adapters, "merged": merged}
