"""From the arguments of a plain vLLM engine to those of a proxy-tuned one."""

import math
import os
from typing import Any

from proxy_vllm.config import ARCHITECTURE, CONFIG_KEY, ProxyConfig
from proxy_vllm.envs import cpu_runner
from proxy_vllm.errors import UserError
from proxy_vllm.own_prompts.prompts import SCHEDULER

_CPU_KV_CACHE_CAP = 4 << 30


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
    worker = "cpu_worker.ProxyCPUWorker" if on_cpu else "gpu_worker.ProxyWorker"
    out["worker_cls"] = f"proxy_vllm.worker.{worker}"

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
    return {**out, **cpu_kv_cache(out)}


def _excludes_own_prompts(kwargs: dict[str, Any], on_cpu: bool) -> str | None:
    """Why engine arguments exclude prompts of each model's own, as far as they alone tell."""
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


def ranks_of(kwargs: dict[str, Any]) -> int:
    """Processes of one engine that hold a part of the models: tensor times pipeline ranks."""
    sizes = (kwargs.get(f"{kind}_parallel_size") for kind in ("tensor", "pipeline"))
    return math.prod(max(1, int(size or 1)) for size in sizes)


def cpu_kv_cache(kwargs: dict[str, Any], engines: int = 1) -> dict[str, int]:
    """A KV cache that fits on a CPU: vLLM's default share is refused on small machines.

    Args:
        kwargs: engine arguments of one engine.
        engines: engines that run beside each other on this machine.

    Returns:
        ``kv_cache_memory_bytes`` of each rank; empty on a GPU, and where the user chose a size.
    """
    from vllm.platforms import current_platform

    if (
        not current_platform.is_cpu()
        or kwargs.get("kv_cache_memory_bytes") is not None
        or os.environ.get("VLLM_CPU_KVCACHE_SPACE")
        or kwargs.get("gpu_memory_utilization") not in (None, 0.92)
    ):
        return {}
    import psutil

    ranks = engines * ranks_of(kwargs) * max(1, int(kwargs.get("data_parallel_size") or 1))
    share = psutil.virtual_memory().available // 4 // ranks
    return {"kv_cache_memory_bytes": min(share, _CPU_KV_CACHE_CAP)}
