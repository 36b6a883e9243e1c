"""From the arguments of a plain vLLM engine to those of a proxy-tuned one."""

import math
import os
from types import SimpleNamespace
from typing import Any

from proxy_vllm.config import (
    ARCHITECTURE,
    AUTO_DRAFTS,
    CONFIG_KEY,
    ProxyConfig,
    check_vllm_version,
)
from proxy_vllm.envs import cpu_runner
from proxy_vllm.errors import UserError
from proxy_vllm.lifetime import mark_children
from proxy_vllm.own_prompts.prompts import SCHEDULER

_CPU_KV_CACHE_CAP = 4 << 30

# The most drafts a step that are chosen automatically.
AUTO_MOST = 4

_EXCLUDES_DRAFTS = {
    "pipeline_parallel_size": "the expert is spread over the pipeline's ranks and cannot draft",
    "decode_context_parallel_size": "drafts are not split over context-parallel ranks",
    "prefill_context_parallel_size": "drafts are not split over context-parallel ranks",
    "enable_trace_replay": "a replayed token is not drawn, and drafts are held against draws",
    "return_sampling_mask": "masks of drafted positions are not kept",
    "watermark_config": "watermarks are drawn by a sampler of vLLM's that cannot verify drafts",
}


def prepare_engine_args(
    kwargs: dict[str, Any],
    proxy: ProxyConfig,
    *,
    base_chat_template: str | None = None,
    caps_max_tokens: bool = False,
) -> dict[str, Any]:
    """Check a trio and turn the base's engine arguments into those of the proxy-tuned engine.

    Args:
        kwargs, proxy: as for ``apply_to_engine_args``.
        base_chat_template, caps_max_tokens: as for ``proxy_vllm.surface.expert.show_expert``.

    Raises:
        UserError: members that do not fit together, or arguments that they cannot honour.
    """
    from proxy_vllm.checks.same_weights import with_same_weights
    from proxy_vllm.checks.token_names import with_named_tokens
    from proxy_vllm.plugin import register
    from proxy_vllm.surface.expert import show_expert
    from proxy_vllm.validate import validate_trio

    check_vllm_version()
    register()
    _configure_logging(kwargs)
    if proxy.remote_base is not None:
        from proxy_vllm.remote_base.start import checked_endpoint, local_engine_args

        kwargs = local_engine_args(kwargs, proxy)
    proxy = proxy.with_base(str(kwargs["model"]))
    kwargs, configs = validate_trio(kwargs, proxy)
    if proxy.remote_base is not None:
        proxy = checked_endpoint(proxy, configs)
    proxy = with_same_weights(proxy, configs, adapted=bool(kwargs.get("enable_lora")))
    kwargs = show_expert(
        kwargs,
        configs,
        proxy,
        base_chat_template=base_chat_template,
        caps_max_tokens=caps_max_tokens,
    )
    if not kwargs.get("skip_tokenizer_init"):
        proxy = with_named_tokens(proxy, configs)
    return apply_to_engine_args(kwargs, proxy)


def _configure_logging(kwargs: dict[str, Any]) -> None:
    """Set vLLM's logging up as its engine will: before that, no message below a warning is seen."""
    from vllm.logger import configure_logging_from_args

    names = ("logging_config", "log_level", "log_config_file")
    given = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
    configure_logging_from_args(SimpleNamespace(**given))


def apply_to_engine_args(kwargs: dict[str, Any], proxy: ProxyConfig) -> dict[str, Any]:
    """Turn keyword arguments of a plain vLLM engine into those of a proxy-tuned one.

    Args:
        kwargs: arguments of ``vllm.LLM`` or ``vllm.EngineArgs``, with ``model`` the base.
        proxy: the members and their strength.

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

    if (proxy.takes_own_prompts or proxy.expert_drafts) and out.get("scheduler_cls") is None:
        out["scheduler_cls"] = SCHEDULER
    if proxy.expert_drafts:
        out["speculative_config"] = _expert_drafts(out, proxy)
    if proxy.fused_head_max_batch > 0 and on_cpu and cpu_runner() == "v1":
        raise UserError("--fused-head-max-batch needs Model Runner V2, a GPU's: leave it out")
    if proxy.takes_own_prompts and (excluded := _excludes_own_prompts(out, proxy, on_cpu)):
        option = "--own-prompts, or a chat template of a small member"
        raise UserError(f"{'--method cfg' if proxy.guided else option}: {excluded}")
    if proxy.sampler_cuda_graphs and (excluded := _excludes_sampler_graphs(out, on_cpu)):
        raise UserError(f"--sampler-cuda-graphs: {excluded}")
    if on_cpu:
        cpu_runner()  # says now, and not in a worker, that the variable is wrong
    mark_children()
    return {**out, **cpu_kv_cache(out)}


def _excludes_own_prompts(kwargs: dict[str, Any], proxy: ProxyConfig, on_cpu: bool) -> str | None:
    """Why engine arguments exclude prompts of each model's own, as far as they alone tell."""
    if on_cpu and cpu_runner() == "v1":
        return (
            "models with prompts of their own need a GPU, or PROXY_VLLM_CPU_RUNNER=v2 for tests on"
            " a CPU"
        )
    if kwargs.get("speculative_config") and not proxy.expert_drafts:
        return (
            "--speculative-config excludes prompts of each model's own; --speculative-tokens goes"
            " with them"
        )
    return None


def _expert_drafts(kwargs: dict[str, Any], proxy: ProxyConfig) -> dict[str, Any]:
    """vLLM's configuration of speculation, for drafts of the composite's own expert.

    vLLM wants to be told of a draft model with the base's vocabulary. Nothing is loaded by that
    name: the workers put the expert in its place, whatever its vocabulary.
    """
    if kwargs.get("speculative_config"):
        raise UserError("--speculative-tokens and --speculative-config: give one of them")
    for name, why in _EXCLUDES_DRAFTS.items():
        value = kwargs.get(name)
        if value is True or (value and value != 1):
            option = "--" + name.replace("_", "-")
            raise UserError(f"--speculative-tokens with {option} {value}: {why}; leave one out")
    auto = proxy.speculative_tokens == AUTO_DRAFTS
    if auto and int(kwargs.get("data_parallel_size") or 1) > 1:
        raise UserError(
            f"--speculative-tokens {AUTO_DRAFTS} with --data-parallel-size: engines that run in"
            " step have to draft alike; name a number"
        )
    # vLLM captures CUDA graphs of every number of drafts that this names; the scheduler chooses.
    lengths = [(i + 1, i + 1, AUTO_MOST - i) for i in range(AUTO_MOST)]
    return {
        "model": kwargs["model"],
        "revision": kwargs.get("revision"),
        "code_revision": kwargs.get("code_revision"),
        "method": "draft_model",
        "num_speculative_tokens": AUTO_MOST if auto else proxy.speculative_tokens,
        "num_speculative_tokens_per_batch_size": (
            [*lengths, (AUTO_MOST + 1, 1 << 16, 0)] if auto else None
        ),
    }


def _excludes_sampler_graphs(kwargs: dict[str, Any], on_cpu: bool) -> str | None:
    """Why engine arguments exclude CUDA graphs of the sampler."""
    if on_cpu:
        return "there are no CUDA graphs on a CPU; leave it out"
    if kwargs.get("enforce_eager"):
        return "--enforce-eager excludes CUDA graphs; leave one of them out"
    if int(kwargs.get("tensor_parallel_size") or 1) > 1:
        return "ranks of --tensor-parallel-size exchange tokens outside graphs; leave it out"
    if kwargs.get("speculative_config"):
        return "steps that verify drafts sample outside of these graphs; leave one of them out"
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
