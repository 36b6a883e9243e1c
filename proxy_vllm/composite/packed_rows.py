"""Rows that carry hidden states of several members and the request's steering through vLLM."""

from collections.abc import Mapping

import torch
import torch.nn as nn

from proxy_vllm.kernels.row_parameters import Plausibility, Steering

# Parts of a packed row begin at multiples of this many elements. The heads' products load 16 bytes
# at once only where every row begins at a multiple of that; Triton asks for 16 elements to know.
_SLOT = 16


class PackedRows:
    """One tensor ``[T, width]``: hidden states side by side, then the bits of three float32.

    These are alpha and both values of ``Plausibility``.

    Packing costs one write and one read of the hidden states, for 8B + 2 x 1B 16 KiB a token: under
    a microsecond in a decode step of 64 rows at 4 TB/s, and one launch. Without it the states would
    have to reach the sampler beside vLLM's runner, through attributes that CUDA graphs, draft
    verification and pipeline ranks know nothing of.

    Args:
        dtypes: of the hidden state of each member that has one of its own, in their order.
    """

    def __init__(self, dtypes: Mapping[str, torch.dtype]) -> None:
        self.dtypes = dict(dtypes)
        several = len(set(self.dtypes.values())) > 1
        # Any 16-bit hidden state passes through float32 unchanged.
        self.dtype = torch.float32 if several else next(iter(self.dtypes.values()))
        # Hidden size of each member, known when it has run once (some project after their norm).
        self.widths: dict[str, int] = {}

    @property
    def width(self) -> int:
        """Elements of a row; 0 until rows have been packed once."""
        return sum(self._slots()) + _SLOT if self.widths else 0

    def pack(
        self,
        hidden: Mapping[str, torch.Tensor],  # [T, d_m] of each member
        alpha: torch.Tensor,  # [T] float32
        plausibility: torch.Tensor,  # [2, T] float32: log_beta, drop
    ) -> torch.Tensor:  # [T, width]
        self.widths = {role: hidden[role].shape[-1] for role in self.dtypes}
        parts = []
        for slot, (role, width) in zip(self._slots(), self.widths.items()):
            part = hidden[role].to(self.dtype)
            parts.append(nn.functional.pad(part, (0, slot - width)) if slot > width else part)
        values = _SLOT * self.dtype.itemsize // alpha.itemsize
        steering = torch.stack([alpha, *plausibility], dim=1)
        steering = nn.functional.pad(steering, (0, values - steering.shape[1]))
        return torch.cat([*parts, steering.view(self.dtype)], dim=-1)

    def unpack(
        self, packed: torch.Tensor
    ) -> tuple[dict[str, torch.Tensor], Steering]:  # [N, d_m] of each member
        slots = self._slots()
        *parts, bits = packed.split([*slots, packed.shape[-1] - sum(slots)], dim=-1)
        hidden = {
            role: part[:, : self.widths[role]].to(dtype)
            for part, (role, dtype) in zip(parts, self.dtypes.items())
        }
        count = len(packed)
        # Each begins at a multiple of 16 bytes: Triton compiles anew for one that does not.
        values = torch.empty(3, -(-count // 4) * 4, dtype=torch.float32, device=packed.device)
        values = values[:, :count].copy_(bits.view(torch.float32)[:, :3].t())
        alpha, log_beta, drop = values
        return hidden, Steering(alpha, Plausibility(log_beta, drop))

    def _slots(self) -> list[int]:
        """Elements of each member's part of a row."""
        return [-(-width // _SLOT) * _SLOT for width in self.widths.values()]
