"""What LoRA adapters of the expert take: slots beside its layers."""

from __future__ import annotations

from dataclasses import dataclass

from proxy_vllm.errors import UserError
from proxy_vllm.plan.model_size import ElementBytes, ModelShape

# Sizes for which vLLM has kernels.
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class AdapterSlots:
    """As many slots as adapters in one step, each for an adapter of at most this rank.

    ``alone``: the expert is the antiexpert plus an adapter, and shares its weights.
    """

    count: int = 1
    rank: int = 16
    alone: bool = True

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UserError(f"--max-loras {self.count}: give a whole number from 1")
        if self.rank not in RANKS:
            raise UserError(f"--max-lora-rank {self.rank}: vLLM has {', '.join(map(str, RANKS))}")

    def bytes(self, expert: ModelShape, size: ElementBytes) -> float:
        """Of all slots: two matrices beside each layer and the token table, but not the head."""
        return self.count * self.rank * expert.params.adapted * size.weights
