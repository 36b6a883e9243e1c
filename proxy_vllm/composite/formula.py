"""The proxy-tuning formula on logits, for whichever device the logits are on.

    logits = base + alpha * (expert - antiexpert)        (Liu et al. 2024, arXiv 2401.08565)

What widths, padding, infinities and NaN mean is defined once, in ``kernels/reference.py``. On a GPU
(and in Triton's interpreter) the kernel of ``kernels/combine_sample.py`` computes it, on a CPU
PyTorch.
"""

from collections.abc import Callable
from functools import cache

import torch

from proxy_vllm.envs import cpu_runner
from proxy_vllm.kernels.columns import Columns, shift_of_missing
from proxy_vllm.kernels.row_parameters import Plausibility

Gather = Callable[[torch.Tensor], torch.Tensor]


def combine_logits(
    base: torch.Tensor,  # [B, V]
    expert: torch.Tensor,  # [B, V_e]
    antiexpert: torch.Tensor,  # [B, V_a]
    alpha: torch.Tensor,  # [B] float32
    columns: Columns | None = None,
    *,
    missing_shift: torch.Tensor | None = None,
    plausibility: Plausibility | None = None,
    gather: Gather = lambda tensor: tensor[None],
    masked: bool = True,
    compiled: bool = False,
) -> torch.Tensor:  # [B, V] float32
    """Combine raw logits of the three members; a row with alpha 0 is the base's row exactly.

    Args:
        columns: which tokens the logits are of; None: the base's from the first, all with a name.
        missing_shift: ``[B]``, what ``shift_of_missing`` gives; needed for shards only.
        plausibility: which tokens of each row the base has to find plausible; None for all.
        gather: what all ranks passed to it, stacked; needed for shards only, which may be empty.
        masked: whether some row may lose tokens by its plausibility: on a GPU a launch more.
        compiled: on a CPU, compile the formula for one pass over memory. Its first calls take
            seconds: for engines that compile their models too.
    """
    columns = columns or Columns.of(base, expert, antiexpert)
    if missing_shift is None:
        missing_shift = shift_of_missing(expert, antiexpert, columns)
    width = base.shape[1]
    if base.is_cuda or cpu_runner() == "v2":
        from proxy_vllm.kernels.combine_sample import find_base_max, proxy_combine

        limits: dict[str, torch.Tensor] = {}
        if plausibility is not None:
            log_beta = plausibility.log_beta
            largest = base.new_full((len(base), 1), -torch.inf, dtype=torch.float32)
            if masked:
                if width:
                    parts = find_base_max(base, expert, antiexpert, alpha, log_beta, columns)
                    largest = parts.amax(dim=1, keepdim=True)
                largest = gather(largest).amax(dim=0)
            limits = {"log_beta": log_beta, "drop": plausibility.drop, "base_max": largest}
        if not width:
            return base.float()
        return proxy_combine(
            base,
            expert,
            antiexpert,
            alpha,
            columns=columns,
            missing_shift=missing_shift,
            **limits,
        )
    shared, named = (columns.local(end, width) for end in (columns.shared, columns.named))
    expert, antiexpert = expert[:, :shared], antiexpert[:, :shared]
    combine_finite = _compiled() if compiled and width else _combine_finite
    logits, finite = combine_finite(base, expert, antiexpert, alpha)
    if not finite:
        from proxy_vllm.kernels.reference import combine

        logits[:, :shared] = combine(
            base[:, :shared], expert, antiexpert, alpha, dtype=torch.float32
        )
    if missing_shift is not None:
        shift = torch.where(alpha == 0, 0.0, alpha * missing_shift)
        logits[:, shared:named] += shift[:, None]
    logits[:, named:].masked_fill_((alpha != 0)[:, None], -torch.inf)
    if plausibility is not None:
        _drop_implausible(logits, base, alpha, plausibility, gather)
    return logits


def _drop_implausible(
    logits: torch.Tensor,  # [B, V] float32, changed in place
    base: torch.Tensor,  # [B, V]
    alpha: torch.Tensor,  # [B]
    plausibility: Plausibility,
    gather: Gather,
) -> None:
    """See ``plausible`` in ``kernels/reference.py``; rows without a threshold cost nothing."""
    index = ((plausibility.log_beta > -torch.inf) & (alpha != 0)).nonzero()[:, 0]
    if not len(index):
        return
    combined, own = logits[index], base[index].float()
    drawable = own.masked_fill(~(combined > -torch.inf), -torch.inf)
    edge = own.new_full((len(index), 1), -torch.inf)  # for a shard without columns
    largest = torch.cat([drawable, edge], dim=1).amax(dim=1, keepdim=True)
    floor = gather(largest).amax(dim=0) + plausibility.log_beta[index, None]
    dropped = combined - plausibility.drop[index, None]
    logits[index] = torch.where(own < floor, dropped, combined)


def _combine_finite(
    base: torch.Tensor, expert: torch.Tensor, antiexpert: torch.Tensor, alpha: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The formula where the small members' logits are finite, and whether they are.

    In place, since each new tensor of this size costs a pass. Infinities are rare, so that a sum
    that hides none is enough to look for them.
    """
    shift = expert.to(torch.float32, copy=True)
    shift -= antiexpert
    logits = base.to(torch.float32, copy=True)
    logits[:, : shift.shape[1]].addcmul_(shift, alpha[:, None])
    return logits, shift.sum().isfinite()


def _combine_finite_in_one_pass(
    base: torch.Tensor, expert: torch.Tensor, antiexpert: torch.Tensor, alpha: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in the form from which Inductor makes one loop."""
    width = expert.shape[1]
    shift = expert.float() - antiexpert.float()
    shifted = base[:, :width].float() + alpha[:, None] * shift
    return torch.cat([shifted, base[:, width:].float()], dim=1), shift.isfinite().all()


@cache
def _compiled() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    return torch.compile(_combine_finite_in_one_pass, dynamic=True)
