"""Ways to draw a token from three members' outputs, by name: one registry for tests and benchmarks.

| name | what runs |
|---|---|
| `eager+vllm` | PyTorch combines in float32, vLLM's sampler filters and draws |
| `eager+flashinfer` | the same, FlashInfer filters and draws (statistically equal, own noise) |
| `proxy` | `combine_sample.proxy_sample`, after the launch that gathers the rows' parameters |
| `heads+proxy` | three matrix products store logits, then `proxy` |
| `fused_head` | `fused_head.fused_head_sample`, no logits in memory |
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch
from vllm.v1.worker.gpu.buffer_utils import UvaBackedTensor

from proxy_vllm.kernels.combine_sample import proxy_sample
from proxy_vllm.kernels.fused_head import fused_head_sample
from proxy_vllm.kernels.row_parameters import Plausibility, RowParameters, Steering
from proxy_vllm.worker.row_buffers import RowBuffers


def _in_host_memory(vector: torch.Tensor) -> Any:
    """As vLLM keeps a request's parameters: read by the device over the bus, where there is one."""
    if not vector.is_cuda:
        return SimpleNamespace(gpu=vector)
    held = UvaBackedTensor(len(vector), dtype=vector.dtype)
    held.np[:] = vector.cpu().numpy()
    held.copy_to_uva()
    return held


@dataclass
class SamplerInputs:
    """One batch: its rows' parameters, and logits or heads, whichever is drawn from."""

    rows: RowParameters
    logits: tuple[torch.Tensor, ...] = ()  # 3 x [B, V]
    hidden: tuple[torch.Tensor, ...] = ()  # 3 x [B, d_m]
    weights: tuple[torch.Tensor, ...] = ()  # 3 x [V, d_m]

    @cached_property
    def _engine(self) -> tuple[RowBuffers, SimpleNamespace, SimpleNamespace]:
        """The rows' parameters where an engine has them: by request slot, in host memory."""
        rows, device = self.rows, self.rows.alpha.device
        slots = torch.arange(len(rows.alpha), device=device)
        off = {"top_k": slots.int() * 0, "top_p": rows.alpha * 0 + 1, "min_p": rows.alpha * 0}
        used = {name: getattr(rows, name) for name in rows.used if getattr(rows, name) is not None}
        vectors = {"temperature": rows.temperature, "seeds": rows.seeds, **off, **used}
        states = SimpleNamespace(**{name: _in_host_memory(v) for name, v in vectors.items()})
        batch = SimpleNamespace(
            expanded_idx_mapping=slots, logits_indices=slots, positions=rows.positions
        )
        return RowBuffers(len(slots), device), batch, states

    def gathered(self) -> RowParameters:
        """What one launch a step makes of them for the kernels."""
        buffers, batch, states = self._engine
        buffers.gather(batch, states)
        used = self.rows.used if self.rows.filtered else frozenset()
        alpha = self.rows.alpha
        off = Plausibility(alpha.new_full(alpha.shape, -torch.inf), alpha.new_zeros(alpha.shape))
        return buffers.rows(Steering(alpha, off), used)


@dataclass(frozen=True)
class Provider:
    """`draw` gives tokens [B]; `missing` says why the provider cannot run here, or None."""

    name: str
    draw: Callable[[SamplerInputs], torch.Tensor]
    missing: Callable[[], str | None]
    source: str  # "logits" or "heads"
    filters: bool = True  # takes top-k, top-p and min-p
    same_noise: bool = True  # draws the reference's own tokens
    mixed: bool = True  # takes greedy rows beside random ones


def _anywhere() -> None:
    return None


def eager_combine(inputs: SamplerInputs) -> torch.Tensor:  # [B, V] float32
    """The formula in plain PyTorch, float32."""
    base, expert, antiexpert = (tensor.float() for tensor in inputs.logits)
    return base + inputs.rows.alpha[:, None] * (expert - antiexpert)


def _rows(logits: torch.Tensor) -> torch.Tensor:
    return torch.arange(logits.shape[0], dtype=torch.int32, device=logits.device)


def _used(rows: RowParameters, name: str) -> torch.Tensor | None:
    """One filter, None where no row uses it: vLLM leaves it out then."""
    return getattr(rows, name) if name in rows.used else None


def _scaled_by_vllm(inputs: SamplerInputs) -> torch.Tensor:
    from vllm.v1.worker.gpu.sample.gumbel import apply_temperature
    from vllm.v1.worker.gpu.sample.min_p import apply_min_p

    logits = eager_combine(inputs)
    apply_temperature(logits, _rows(logits), inputs.rows.temperature)
    min_p = _used(inputs.rows, "min_p")
    if min_p is not None:
        apply_min_p(logits, _rows(logits), min_p)
    return logits


def _eager_vllm(inputs: SamplerInputs) -> torch.Tensor:
    from vllm.v1.sample.ops import topk_topp_sampler
    from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample

    logits = _scaled_by_vllm(inputs)
    top_k, top_p = _used(inputs.rows, "top_k"), _used(inputs.rows, "top_p")
    if top_k is not None or top_p is not None:
        # vLLM's Triton filter does not run in the interpreter; its sort-based one does anywhere.
        gpu = logits.is_cuda
        name = "apply_top_k_top_p" if gpu else "apply_top_k_top_p_pytorch"
        logits = getattr(topk_topp_sampler, name)(logits, top_k, top_p)
    return gumbel_sample(
        logits,
        _rows(logits),
        inputs.rows.temperature,
        inputs.rows.seeds,
        inputs.rows.positions,
        apply_temperature=False,
        is_drafting=False,
    )


def _flashinfer_missing() -> str | None:
    if not torch.cuda.is_available():
        return "needs a CUDA GPU"
    return None if find_spec("flashinfer") else "flashinfer is not installed"


def _eager_flashinfer(inputs: SamplerInputs) -> torch.Tensor:
    from vllm.v1.sample.ops.topk_topp_sampler import flashinfer_sample

    logits = _scaled_by_vllm(inputs)
    top_k, top_p = _used(inputs.rows, "top_k"), _used(inputs.rows, "top_p")
    if top_k is None and top_p is None:
        import flashinfer

        return flashinfer.sampling.sampling_from_logits(logits, deterministic=True).long()
    return flashinfer_sample(logits, top_k, top_p).long()


def _proxy(inputs: SamplerInputs) -> torch.Tensor:
    return proxy_sample(*inputs.logits, inputs.gathered())


def _heads_proxy(inputs: SamplerInputs) -> torch.Tensor:
    logits = [h @ w.T for h, w in zip(inputs.hidden, inputs.weights)]
    return proxy_sample(*logits, inputs.gathered())


def _fused_head(inputs: SamplerInputs) -> torch.Tensor:
    return fused_head_sample(inputs.hidden, inputs.weights, inputs.gathered())[0]


PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider("eager+vllm", _eager_vllm, _anywhere, "logits"),
        Provider(
            "eager+flashinfer",
            _eager_flashinfer,
            _flashinfer_missing,
            "logits",
            same_noise=False,
            mixed=False,
        ),
        Provider("proxy", _proxy, _anywhere, "logits"),
        Provider("heads+proxy", _heads_proxy, _anywhere, "heads"),
        Provider("fused_head", _fused_head, _anywhere, "heads", filters=False),
    )
}


def get_provider(name: str) -> Provider:
    """The provider of that name; ValueError with the known names, or with why it cannot run."""
    if name not in PROVIDERS:
        raise ValueError(f"provider: {name!r} is not known: {', '.join(PROVIDERS)}")
    reason = PROVIDERS[name].missing()
    if reason:
        raise ValueError(f"provider: {name} {reason}")
    return PROVIDERS[name]
