"""The proxy-tuning formula on logits, for whichever device the logits are on.

    logits = base + alpha * (expert - antiexpert)        (Liu et al. 2024, arXiv 2401.08565)

What widths, infinities and NaN mean is defined once, in ``kernels/reference.py``. On a GPU (and in
Triton's interpreter) the kernel of ``kernels/combine_sample.py`` computes it, on a CPU PyTorch.
"""

import torch

from proxy_vllm.envs import cpu_runner


def combine_logits(
    base: torch.Tensor,  # [B, V]
    expert: torch.Tensor,  # [B, V_e]
    antiexpert: torch.Tensor,  # [B, V_a]
    alpha: torch.Tensor,  # [B] float32
) -> torch.Tensor:  # [B, V] float32
    """Combine raw logits of the three members; a row with alpha 0 is the base's row exactly."""
    if base.is_cuda or cpu_runner() == "v2":
        from proxy_vllm.kernels.combine_sample import proxy_combine

        return proxy_combine(base, expert, antiexpert, alpha)
    width = min(base.shape[-1], expert.shape[-1], antiexpert.shape[-1])
    shift = expert[:, :width].to(torch.float32, copy=True)
    shift -= antiexpert[:, :width]
    if not shift.sum().isfinite():  # cheaper than looking at each; rare enough to look twice
        from proxy_vllm.kernels.reference import combine

        return combine(base, expert, antiexpert, alpha, dtype=torch.float32)
    logits = base.to(torch.float32, copy=True)
    logits[:, :width].addcmul_(shift, alpha[:, None])
    return logits
