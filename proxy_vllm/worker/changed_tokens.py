"""How often steering changes the likeliest token, measured in one step of every so many."""

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from proxy_vllm.composite.model import ProxyTunedForCausalLM

# Of a step that is measured, this many rows the most: its cost does not grow with the batch.
_ROWS = 16


class ChangedTokens:
    """Counts tokens of answers, and those among them where the base alone would choose another.

    What is compared is the likeliest token of the base and of the combined logits, before any
    sampling parameter, so that noise changes nothing. Nothing waits for the device: the counts are
    read when somebody asks.

    Args:
        every: measure one step of this many; 0 for none.
        device: of the hidden states.
    """

    def __init__(self, every: int, device: torch.device) -> None:
        self.every = every
        self._steps = 0
        self._counts = torch.zeros(2, dtype=torch.int64, device=device)

    def due(self) -> bool:
        """Whether this step is to be measured; called once a step, alike on every rank."""
        if not self.every:
            return False
        self._steps += 1
        return self._steps % self.every == 0

    def measure(
        self,
        model: "ProxyTunedForCausalLM",
        packed: torch.Tensor,  # [B, packed width], the row of each request's next token
        emits: torch.Tensor,  # [B] bool; False while a prompt is not read to its end
    ) -> None:
        """Compare some rows of a step; rows with alpha 0, or of one member, do not count."""
        count = packed.shape[0]
        if count > _ROWS:
            # Other requests each time.
            first = self._steps // self.every * _ROWS
            index = (torch.arange(_ROWS, device=packed.device) + first) % count
            packed, emits = packed[index], emits[index]
        logits, steering = model.logits_and_steering(*model.unpack(packed))
        alpha = steering.alpha
        if logits.members[0] is None:
            return  # vLLM gathers logits on one rank only where it cannot on all
        base = replace(steering, alpha=torch.zeros_like(alpha))
        steered = model.combine(logits, steering).argmax(dim=-1)
        alone = model.combine(logits, base, masked=False).argmax(dim=-1)
        counted = emits & (alpha != 0)
        self._counts += torch.stack([counted.sum(), (counted & (steered != alone)).sum()])

    def counts(self) -> tuple[int, int]:
        """Tokens that were compared, and changed ones among them, since the start."""
        if not self.every:
            return 0, 0
        compared, changed = self._counts.tolist()
        return compared, changed

    def reset(self) -> None:
        self._counts.zero_()
