"""What decides the token of each row besides its logits: one value for every launch and caller."""

from dataclasses import dataclass, replace

import torch

from proxy_vllm.kernels.checks import check_vector

FILTERS = ("top_k", "top_p", "min_p")
PLAUSIBILITY = "log_beta"
_OFF = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}


@dataclass(frozen=True)
class Plausibility:
    """Which tokens of each row the base has to find plausible (`reference.plausible`).

    log_beta: log of the threshold; -inf is off. drop: what the logits of other tokens lose: inf
    where they are never drawn, and a number far above any difference of logits where a request's
    own constraints may leave no other token.
    """

    log_beta: torch.Tensor  # [B] float32
    drop: torch.Tensor  # [B] float32

    def select(self, index: torch.Tensor) -> "Plausibility":
        return Plausibility(self.log_beta[index], self.drop[index])


@dataclass(frozen=True)
class Steering:
    """How strongly each row is steered, and to which tokens."""

    alpha: torch.Tensor  # [B] float32
    plausibility: Plausibility

    @classmethod
    def joined(cls, parts: "list[Steering]") -> "Steering":
        """Rows of one after rows of the other."""
        own = [(p.alpha, p.plausibility.log_beta, p.plausibility.drop) for p in parts]
        alpha, log_beta, drop = (torch.cat(vectors) for vectors in zip(*own))
        return cls(alpha, Plausibility(log_beta, drop))

    def select(self, index: torch.Tensor) -> "Steering":
        return Steering(self.alpha[index], self.plausibility.select(index))


@dataclass(frozen=True)
class RowParameters:
    """Parameters of a batch, one entry a row: contiguous vectors on the device of the logits.

    temperature: 0 is argmax. top_k: 0, -1 or >= V is off. top_p: 1 is off. min_p: 0 is off. A
    filter that is None is off in every row. log_beta: log of the plausibility threshold beta (see
    `reference.plausible`); -inf, the log of 0, is off.

    The kernels come in two sets, one without filters and one that knows all three, so that no mix
    of requests needs a kernel that another mix has not compiled. ``used`` names the filters that
    some row may use: a caller that knows that no row uses top_k or top_p saves the launches that
    search for its thresholds by leaving the name out.
    """

    alpha: torch.Tensor  # [B] float32
    temperature: torch.Tensor  # [B] float32
    seeds: torch.Tensor  # [B] int64
    positions: torch.Tensor  # [B] int64
    top_k: torch.Tensor | None = None  # [B] int32
    top_p: torch.Tensor | None = None  # [B] float32
    min_p: torch.Tensor | None = None  # [B] float32
    log_beta: torch.Tensor | None = None  # [B] float32
    used: frozenset[str] = frozenset((*FILTERS, PLAUSIBILITY))

    @property
    def filtered(self) -> bool:
        return any(getattr(self, name) is not None for name in FILTERS)

    @property
    def masked(self) -> bool:
        """Whether some row may lose tokens that the base finds implausible."""
        return self.log_beta is not None and PLAUSIBILITY in self.used

    def complete(self) -> "RowParameters":
        """With all three filters if there is any; what was None is off in every row."""
        missing = [name for name in FILTERS if getattr(self, name) is None]
        if not self.filtered or not missing:
            return self
        like = {"top_k": torch.int32}
        off = {
            name: self.temperature.new_empty(
                self.temperature.shape, dtype=like.get(name, torch.float32)
            ).fill_(_OFF[name])
            for name in missing
        }
        return replace(self, **off, used=self.used - set(missing))

    def select(self, index: torch.Tensor) -> "RowParameters":
        """Some of the rows."""
        vectors = {n: v[index] for n, v in vars(self).items() if isinstance(v, torch.Tensor)}
        return replace(self, **vectors)

    def check(self, num_rows: int, device: torch.device) -> None:
        """Raises ValueError naming the vector with a wrong shape, dtype, device or stride."""
        check_alpha(self.alpha, num_rows, device)
        dtypes = {"seeds": torch.int64, "positions": torch.int64, "top_k": torch.int32}
        optionals = (*FILTERS, PLAUSIBILITY)
        for name in ("temperature", "seeds", "positions", *optionals):
            dtype = dtypes.get(name, torch.float32)
            optional = name in optionals
            check_vector(name, getattr(self, name), dtype, device, num_rows, optional)

    def pointers(self, *names: str) -> dict[str, torch.Tensor | None]:
        """Some of the vectors as keyword arguments of a kernel."""
        return {f"{name}_ptr": getattr(self, name) for name in names}


def check_alpha(alpha: torch.Tensor, num_rows: int, device: torch.device) -> None:
    check_vector("alpha", alpha, torch.float32, device, num_rows)
