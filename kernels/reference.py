"""Plain PyTorch definition of proxy sampling; the ground truth of every kernel in this folder.

Proxy-tuning (Liu et al. 2024, arXiv 2401.08565) shifts the logits of a large base model by the
difference that tuning made to a small one:

    logits = base + alpha * (expert - antiexpert)

Other formulas are the same with other members in these places (docs/methods.md): `METHODS` has each
as its paper writes it.

The sampling parameters then apply in vLLM's order: temperature, min-p, top-k, top-p, and the token
is the argmax of the kept logits plus Gumbel noise keyed by (seed, position, token id).

Written to be read, not to be fast: loops over rows, sorts the vocabulary, float64 by default.
"""

import math

import torch

from proxy_vllm.kernels.columns import log_sums
from proxy_vllm.kernels.row_parameters import RowParameters

_MASK32 = 0xFFFFFFFF


def combine(
    base: torch.Tensor,  # [B, V]
    expert: torch.Tensor,  # [B, V_e]
    antiexpert: torch.Tensor,  # [B, V_a]
    alpha: torch.Tensor,  # [B]
    named: int | None = None,
    dtype: torch.dtype = torch.float64,
    log_beta: torch.Tensor | None = None,  # [B]
) -> torch.Tensor:  # [B, V]
    """The shifted logits, all arithmetic in `dtype`.

    - alpha == 0 gives the base's logits in every column, whatever the other two hold.
    - The base decides the vocabulary: columns of the other two beyond V are cut.
    - Columns from `named` on are padding, which no tokenizer names: -inf. A model's logits mean the
      same with a constant added to all of them, and training leaves those of padding behind; a
      constant in one small member would move all named tokens against them.
    - A named column that a small member lacks is shifted by alpha * (lse(expert) -
      lse(antiexpert)), the log-sum-exps over the columns that all three have. That is the formula
      on log-probabilities, base + alpha * (log p_expert - log p_antiexpert), with the ratio 1 for
      a token of which the small members say nothing, and then the same constant taken off every
      column: the others keep exactly the paper's logits, and a constant added to any one member
      changes no probability. Leaving the base's logit as it is would not have the latter; leaving
      the token out would keep a base from ending its turn by a token that it alone has.
    - A token that the expert's or the antiexpert's infinite logit forbids: -inf.
    - A base logit of -inf stays -inf.
    - Evaluated as written, difference first: equal expert and antiexpert leave the base exactly,
      and with base == antiexpert and alpha == 1 the expert comes back up to the rounding of one
      subtraction and one addition (exactly, for bfloat16 logits of like magnitude in float32).
    - NaN in the base, or in a member that counts, gives NaN.
    - Tokens that are not `plausible`: -inf, unless alpha == 0.
    """
    base = base.to(dtype)
    named = base.shape[1] if named is None else min(named, base.shape[1])
    shared = min(named, expert.shape[1], antiexpert.shape[1])
    e = expert[:, :shared].to(dtype)
    a = antiexpert[:, :shared].to(dtype)
    forbidden = e.isinf() | a.isinf()
    shift = torch.full_like(base, torch.nan)
    shift[:, :shared] = torch.where(forbidden, -torch.inf, e - a)
    if shared < named:
        sums = log_sums(e, a)
        shift[:, shared:named] = sums[:, :1] - sums[:, 1:]
    shift[:, named:] = -torch.inf
    # Not by a product, since alpha may be negative.
    logits = torch.where(shift == -torch.inf, shift, base + alpha.to(dtype)[:, None] * shift)
    logits = torch.where(base == -torch.inf, base, logits)
    if log_beta is not None:
        kept = plausible(base, logits, log_beta.to(dtype)) | logits.isnan()
        logits = torch.where(kept, logits, -torch.inf)
    return torch.where((alpha == 0)[:, None], base, logits)


def plausible(
    base: torch.Tensor,  # [B, V]
    logits: torch.Tensor,  # [B, V], combined
    log_beta: torch.Tensor,  # [B]
) -> torch.Tensor:  # [B, V] bool
    """Tokens that the base itself finds plausible (Li et al. 2022, arXiv 2210.15097, V_head):

        p_base(token) >= beta * max p_base,   that is   base >= max base + log beta

    The maximum is over the tokens that the formula can draw, so that each row keeps one. -inf, the
    log of 0, keeps all.
    """
    drawable = logits > -torch.inf
    largest = torch.where(drawable, base, -torch.inf).amax(dim=1, keepdim=True)
    return ~(base < largest + log_beta[:, None])


def head_logits(
    hidden: torch.Tensor,  # [B, d]
    weight: torch.Tensor,  # [V, d]
    soft_cap: float = 0.0,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:  # [B, V]
    """An LM head as vLLM's LogitsProcessor applies it: product, soft cap (0: none), scale."""
    logits = hidden.to(dtype) @ weight.to(dtype).T
    if soft_cap:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    return logits * scale


def scaled(logits: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """[B, V] logits over the temperature [B]; greedy rows unscaled, NaN made -inf."""
    logits = torch.where(logits.isnan(), torch.full_like(logits, -torch.inf), logits)
    divisor = torch.where(temperature == 0, torch.ones_like(temperature), temperature)
    return logits / divisor.to(logits.dtype)[:, None]


def _scaled_rows(base, expert, antiexpert, rows, named, dtype) -> torch.Tensor:  # [B, V]
    logits = combine(base, expert, antiexpert, rows.alpha, named, dtype, rows.log_beta)
    return scaled(logits, rows.temperature)


def kept_row(
    x: torch.Tensor,  # [V], temperature applied
    top_k: int,
    top_p: float,
    min_p: float,
) -> torch.Tensor:  # [V] bool
    """Tokens that survive min-p, then top-k, then top-p (0, -1 or >= V: no top-k).

    min-p keeps x >= max(x) + log(min_p). Top-k keeps everything at least as large as the k-th
    largest, ties included. Top-p keeps a token when the probability of all strictly larger ones,
    among what top-k left, is below top_p: the first is always kept, ties stay together. vLLM's
    sort-based version keeps the same set except that among equal logits the sort decides.
    """
    threshold = x.new_tensor(-torch.inf)
    if min_p > 0:
        threshold = torch.maximum(threshold, x.max() + math.log(min_p))
    if 0 < top_k < x.shape[0]:
        threshold = torch.maximum(threshold, torch.sort(x, descending=True).values[top_k - 1])
    kept = x >= threshold
    if top_p < 1 and x.max() > -torch.inf:
        weight = torch.where(x == x.max(), torch.ones_like(x), torch.exp(x - x.max()))
        weight = torch.where(kept, weight, torch.zeros_like(x))
        values, order = torch.sort(x, descending=True)
        cumulative = torch.cumsum(weight[order], 0)
        # Mass of strictly larger tokens: the cumulative sum before the first of equal values.
        first = torch.searchsorted(-values, -values)
        larger = torch.cat([cumulative.new_zeros(1), cumulative])[first]
        inside = torch.empty_like(kept)
        inside[order] = (larger < top_p * cumulative[-1]) | (first == 0)
        kept = kept & inside
    return kept


def murmur3_uniform(
    seed: int, position: int | torch.Tensor, token_ids: torch.Tensor
) -> torch.Tensor:
    """vLLM's float32 uniform of (seed, position, token id), as float64; murmur3_uniform32 there.

    murmur3_32 over the little-endian words seed low, seed high, position low, token id.
    """

    def rotl(value, shift):
        return ((value << shift) | (value >> (32 - shift))) & _MASK32

    def mix(h, key):
        key = (key * 0xCC9E2D51) & _MASK32
        key = (rotl(key, 15) * 0x1B873593) & _MASK32
        return (rotl(h ^ key, 13) * 5 + 0xE6546B64) & _MASK32

    h = 0
    for word in (seed & _MASK32, (seed >> 32) & _MASK32, position & _MASK32):
        h = mix(h, word)
    h = mix(h, token_ids.to(torch.int64) & _MASK32) ^ 16
    h = h ^ (h >> 16)
    h = (h * 0x85EBCA6B) & _MASK32
    h = h ^ (h >> 13)
    h = (h * 0xC2B2AE35) & _MASK32
    h = h ^ (h >> 16)
    return ((h.to(torch.float64) + 0.5) * 2.0**-32).to(torch.float32).to(torch.float64)


def gumbel_noise(seed: int, position: int | torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """float64 -log(-log(1 - u)) of vLLM's uniform; 1 - u is at least 2**-24, as there."""
    u = murmur3_uniform(seed, position, token_ids)
    survival = torch.clamp(1.0 - u, min=2.0**-24)
    log1m = torch.where(u < 0.25, torch.log1p(-u), torch.log(survival))
    return -torch.log(-log1m)


def kept(x: torch.Tensor, rows: RowParameters) -> torch.Tensor:  # [B, V] -> [B, V] bool
    """kept_row of every row with its own filters; those that are None are off."""
    top_k, top_p, min_p = rows.top_k, rows.top_p, rows.min_p
    return torch.stack(
        [
            kept_row(
                logits,
                0 if top_k is None else int(top_k[row]),
                1.0 if top_p is None else float(top_p[row]),
                0.0 if min_p is None else float(min_p[row]),
            )
            for row, logits in enumerate(x)
        ]
    )


def scores(
    base: torch.Tensor,
    expert: torch.Tensor,
    antiexpert: torch.Tensor,
    rows: RowParameters,
    *,
    named: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:  # [B, V]
    """What proxy_sample takes the argmax of: -inf where a filter drops the token."""
    x = _scaled_rows(base, expert, antiexpert, rows, named, dtype)
    token_ids = torch.arange(x.shape[1], device=x.device)
    out = x.clone()
    kept_tokens = kept(x, rows)
    for row in (rows.temperature != 0).nonzero().flatten().tolist():
        noise = gumbel_noise(int(rows.seeds[row]), int(rows.positions[row]), token_ids).to(dtype)
        out[row] = torch.where(kept_tokens[row], x[row] + noise, torch.full_like(noise, -torch.inf))
    return out


def probabilities(
    base: torch.Tensor,
    expert: torch.Tensor,
    antiexpert: torch.Tensor,
    rows: RowParameters,
    *,
    named: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:  # [B, V]
    """Distribution that proxy_sample draws from; every temperature above 0."""
    x = _scaled_rows(base, expert, antiexpert, rows, named, dtype)
    return torch.softmax(torch.where(kept(x, rows), x, -torch.inf), dim=-1)


def _dexperts(base, expert, antiexpert, alpha):
    """Liu et al. 2021 (DExperts), equation 2: softmax(z + alpha (z+ - z-))."""
    return torch.softmax(base + alpha * (expert - antiexpert), dim=-1)


def _proxy(base, expert, antiexpert, alpha):
    """Liu et al. 2024 (proxy-tuning), as a product: p_base (p_expert / p_antiexpert)^alpha."""
    p, e, a = (torch.softmax(member, dim=-1) for member in (base, expert, antiexpert))
    weighted = p * (e / a) ** alpha
    return weighted / weighted.sum(dim=-1, keepdim=True)


def _contrastive(base, amateur, alpha):
    """O'Brien and Lewis 2023, equation 2: (1 + alpha) s_base - alpha s_amateur.

    Li et al. 2022 score by log p_base - log p_amateur, the limit of a large alpha in direction.
    """
    return torch.softmax((1 + alpha) * base - alpha * amateur, dim=-1)


def _dera(reference, aligned, weight):
    """Liu et al. 2024 (DeRa), the geometric mixture: p_reference^(1 - w) p_aligned^w."""
    r, a = (torch.softmax(member, dim=-1) for member in (reference, aligned))
    weighted = r ** (1 - weight) * a**weight
    return weighted / weighted.sum(dim=-1, keepdim=True)


def _cfg(conditional, unconditional, guidance_scale):
    """Sanchez et al. 2023, equation 7: log p(u) + gamma (log p(c) - log p(u))."""
    c, u = (torch.log_softmax(member, dim=-1) for member in (conditional, unconditional))
    return torch.softmax(u + guidance_scale * (c - u), dim=-1)


# The formulas of papers, as probabilities [B, V] from logits, for comparison with `combine`.
METHODS = {
    "proxy": _proxy,
    "dexperts": _dexperts,
    "contrastive": _contrastive,
    "dera": _dera,
    "cfg": _cfg,
}
