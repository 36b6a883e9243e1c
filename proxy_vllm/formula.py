"""The proxy-tuning formula on logits, for whichever device the logits are on.

    logits = base + alpha * (expert - antiexpert)        (Liu et al. 2024, arXiv 2401.08565)

The ground truth in float64 is ``kernels/reference.py``, the GPU's version
``kernels/combine_sample.py``; this file chooses between them and PyTorch on a CPU.
"""

import torch


def combine_logits(
    base: torch.Tensor,  # [B, V]
    expert: torch.Tensor,  # [B, V_e]
    antiexpert: torch.Tensor,  # [B, V_a]
    alpha: torch.Tensor,  # [B] float32
) -> torch.Tensor:  # [B, V] float32
    """Combine raw logits of the three members.

    Only columns that all three members have are shifted: what the small models have past the
    base's vocabulary is cut, and a token that one of them lacks keeps the base's logit. A row with
    alpha 0 is the base's row exactly; a difference that is not a number (both members rule a token
    out) shifts nothing.
    """
    if base.is_cuda:
        from proxy_vllm.kernels.combine_sample import proxy_combine

        return proxy_combine(base, expert, antiexpert, alpha)
    width = min(base.shape[-1], expert.shape[-1], antiexpert.shape[-1])
    logits = base.to(torch.float32, copy=True)
    shift = expert[:, :width].float() - antiexpert[:, :width].float()
    shift.mul_(alpha[:, None]).nan_to_num_(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
    logits[:, :width] += shift
    # An infinite base logit minus an infinite shift is not a number: the base's verdict stands.
    return torch.where(logits.isnan(), base, logits) if not logits.isfinite().all() else logits
