"""Inputs that the kernel tests share, and the comparison with the reference."""

from dataclasses import dataclass, fields, replace

import torch

from proxy_vllm.kernels import reference
from proxy_vllm.kernels.columns import Columns, shift_of_missing
from proxy_vllm.kernels.combine_sample import SampleLaunch, proxy_sample
from proxy_vllm.kernels.row_parameters import RowParameters


@dataclass
class Case:
    base: torch.Tensor
    expert: torch.Tensor
    antiexpert: torch.Tensor
    alpha: torch.Tensor
    temperature: torch.Tensor
    seeds: torch.Tensor
    positions: torch.Tensor

    @property
    def logits(self) -> tuple[torch.Tensor, ...]:
        return self.base, self.expert, self.antiexpert

    def rows(self, **filters: torch.Tensor) -> RowParameters:
        return RowParameters(self.alpha, self.temperature, self.seeds, self.positions, **filters)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return tuple(getattr(self, field.name) for field in fields(self))

    def to(self, device: torch.device | str) -> "Case":
        return Case(*(tensor.to(device) for tensor in self.tensors()))

    def select(self, rows) -> "Case":
        """Some of the rows."""
        return Case(*(tensor[rows] for tensor in self.tensors()))

    def with_logits(self, base, expert, antiexpert) -> "Case":
        return replace(self, base=base, expert=expert, antiexpert=antiexpert)

    def draw(
        self, *, named: int | None = None, tile: int | None = None, fp64: bool = False, **filters
    ) -> torch.Tensor:
        """Tokens of the kernels."""
        columns = Columns.of(*self.logits, named)
        rows = self.rows(**filters)
        return proxy_sample(*self.logits, rows, columns=columns, tile=tile, use_fp64_gumbel=fp64)

    def launch(self, *, tile: int | None = None, **filters: torch.Tensor) -> SampleLaunch:
        """The launches of `draw`, to be made one by one."""
        columns = Columns.of(*self.logits)
        shift = shift_of_missing(self.expert, self.antiexpert, columns)
        return SampleLaunch(
            *self.logits, self.rows(**filters), columns=columns, missing_shift=shift, tile=tile
        )

    def combined(self, named: int | None = None) -> torch.Tensor:
        """The reference's float64 logits."""
        return reference.combine(*(t.cpu() for t in (*self.logits, self.alpha)), named)


def make_case(
    rows: int,
    vocab: int,
    *,
    dtype: torch.dtype = torch.float32,
    extra: tuple[int, int] = (0, 0),  # columns of expert and antiexpert beyond the base's
    scale: float = 3.0,
    lattice: float | None = None,  # round every logit to multiples, so that float32 is exact
    greedy_every: int = 0,
    seed: int = 0,
) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def logits(width):
        values = torch.randn(rows, width, generator=generator) * scale
        if lattice is not None:
            values = (values / lattice).round() * lattice
        return values.to(dtype)

    base, expert, antiexpert = logits(vocab), logits(vocab + extra[0]), logits(vocab + extra[1])
    alpha = torch.rand(rows, generator=generator) * 2
    temperature = torch.rand(rows, generator=generator) + 0.4
    if lattice is not None:
        alpha = (alpha * 2).round() / 2
        temperature = 2.0 ** torch.randint(-1, 2, (rows,), generator=generator).float()
    if greedy_every:
        temperature[::greedy_every] = 0
    seeds = torch.randint(-(2**62), 2**62, (rows,), generator=generator)
    positions = torch.randint(0, 200_000, (rows,), generator=generator)
    return Case(base, expert, antiexpert, alpha, temperature, seeds, positions)


def make_filters(rows: int, *, seed: int = 1, kinds: str = "kpm") -> dict[str, torch.Tensor]:
    """Filters of which every row has its own mixture, off in some."""
    generator = torch.Generator().manual_seed(seed)
    off = torch.rand(rows, 3, generator=generator) < 0.3
    top_k = torch.randint(1, 80, (rows,), generator=generator, dtype=torch.int32)
    top_p = torch.rand(rows, generator=generator) * 0.9 + 0.08
    min_p = torch.rand(rows, generator=generator) * 0.2
    top_k[off[:, 0]] = 0
    top_p[off[:, 1]] = 1
    min_p[off[:, 2]] = 0
    log_beta = (torch.rand(rows, generator=generator) * 0.3).log()
    log_beta[off[:, 0]] = -torch.inf
    named = {
        "k": ("top_k", top_k),
        "p": ("top_p", top_p),
        "m": ("min_p", min_p),
        "b": ("log_beta", log_beta),
    }
    return dict(named[kind] for kind in kinds)


HIDDEN_SIZES = (96, 40, 72)  # of base, expert, antiexpert


def make_heads(
    rows: int,
    vocabs: tuple[int, int, int],
    dtype: torch.dtype,
    sizes: tuple[int, int, int] = HIDDEN_SIZES,
    seed: int = 0,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Hidden states 3 x [rows, d_m] and head weights 3 x [V_m, d_m]."""
    generator = torch.Generator().manual_seed(seed)
    hidden = [torch.randn(rows, d, generator=generator).to(dtype) for d in sizes]
    weights = [
        (torch.randn(v, d, generator=generator) * 2 / d**0.5).to(dtype)
        for v, d in zip(vocabs, sizes)
    ]
    return hidden, weights


def assert_tokens(
    tokens: torch.Tensor,
    case: Case,
    tolerance: float = 2e-4,
    named: int | None = None,
    **filters: torch.Tensor,
) -> None:
    """Every token is the argmax of the float64 reference, up to float32 rounding of its score."""
    tokens = tokens.cpu()
    scores = reference.scores(*case.logits, case.rows(**filters), named=named)
    assert tokens.dtype == torch.int64
    assert tokens.shape == (scores.shape[0],)
    assert ((tokens >= 0) & (tokens < scores.shape[1])).all(), tokens
    reached = scores.gather(1, tokens[:, None])[:, 0]
    best = scores.max(dim=1).values
    wrong = ~((best - reached <= tolerance) | (best == reached))
    assert not wrong.any(), (wrong.nonzero().flatten(), best[wrong] - reached[wrong])


def on(device: torch.device | str, filters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.to(device) for name, tensor in filters.items()}
