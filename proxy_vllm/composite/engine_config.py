"""What the members ask of the engine's configuration, through vLLM's hook for architectures.

vLLM keeps such hooks in a table keyed by architecture, and knows the composite by its own name
alone. The hook of the composite runs those of its members.
"""

import copy
from typing import TYPE_CHECKING

from vllm.logger import init_logger
from vllm.model_executor.models.config import (
    MODELS_CONFIG_MAP,
    HybridAttentionMambaModelConfig,
    VerifyAndUpdateConfig,
)
from vllm.transformers_utils.config import get_config

from proxy_vllm.config import ARCHITECTURE, ROLES, ProxyConfig
from proxy_vllm.lifetime import heed_sigterm

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

logger = init_logger(f"vllm.{__name__}")

NO_STATES_OF_OWN_PROMPTS = (
    "its states are kept at the scheduler's block boundaries, and models that read prompts of their"
    " own (--own-prompts, chat templates of small members) reach those at different tokens"
)

# Fields of configurations whose models have state-space layers (Mamba, Mamba 2).
_STATE_SPACE = ("mamba_d_state", "mamba_chunk_size", "ssm_state_size", "state_size")


class CompositeConfig(VerifyAndUpdateConfig):
    """Called by vLLM while it completes an engine's configuration, in every process."""

    @staticmethod
    def verify_and_update_model_config(model_config: "ModelConfig") -> None:
        for architecture in own_architectures(model_config):
            if (hook := MODELS_CONFIG_MAP.get(architecture)) is not None:
                hook.verify_and_update_model_config(model_config)

    @staticmethod
    def verify_and_update_config(vllm_config: "VllmConfig") -> None:
        from proxy_vllm.composite.member_configs import member_model_configs

        heed_sigterm()
        composite = vllm_config.model_config
        proxy = ProxyConfig.from_vllm_config(vllm_config)
        configs = member_model_configs(composite, proxy)
        _choose_prefix_caching(vllm_config, configs, proxy.takes_own_prompts)
        for role, model_config in configs.items():
            _run_hook(role, vllm_config, model_config)
        _fit_fused_all_reduce(vllm_config, configs)
        _count_experts(composite, configs)
        _read_positions_of_text(composite)


def own_architectures(composite: "ModelConfig") -> list[str]:
    """The architectures that the base's checkpoint names, behind the composite's."""
    own = get_config(
        composite.hf_config_path or composite.model,
        composite.trust_remote_code,
        composite.revision,
        composite.code_revision,
        composite.config_format,
        token=composite.hf_token,
    )
    return list(own.architectures or [])


def register() -> None:
    MODELS_CONFIG_MAP[ARCHITECTURE] = CompositeConfig


def _run_hook(role: str, vllm_config: "VllmConfig", model_config: "ModelConfig") -> None:
    """vLLM's hook for one member. A small member's settles its caches and attention alone."""
    from proxy_vllm.composite.member_configs import view

    own = view(vllm_config, model_config)
    if role != "base":
        for name in ("structured_outputs_config", "compilation_config", "scheduler_config"):
            setattr(own, name, copy.copy(getattr(own, name)))
    if (hook := MODELS_CONFIG_MAP.get(model_config.architecture)) is not None:
        hook.verify_and_update_config(own)
    if model_config.is_hybrid or model_config.is_attention_free:
        HybridAttentionMambaModelConfig.verify_and_update_config(own)


def no_prefix_caching(config: "ModelConfig") -> str | None:
    """Why a member's prefixes cannot be cached; None if they can."""
    from vllm.platforms import current_platform

    if not config.is_prefix_caching_supported:
        return "vLLM has none for its architecture"
    scans = any(hasattr(config.hf_text_config, name) for name in _STATE_SPACE)
    if config.is_hybrid and scans and current_platform.is_cpu():
        return "vLLM's state-space kernel for a CPU (0.32.0) fails with it"
    return None


def _choose_prefix_caching(
    vllm_config: "VllmConfig", configs: "dict[str, ModelConfig]", own_prompts: bool
) -> None:
    if not vllm_config.cache_config.enable_prefix_caching:
        return
    for role, config in configs.items():
        reason = no_prefix_caching(config)
        if own_prompts and (config.is_hybrid or config.is_attention_free):
            reason = NO_STATES_OF_OWN_PROMPTS
        if reason:
            vllm_config.cache_config.enable_prefix_caching = False
            logger.info("Prefix caching is off for the %s %r: %s", role, config.model, reason)
            return


def _count_experts(composite: "ModelConfig", configs: "dict[str, ModelConfig]") -> None:
    """Let a dense base's engine have what a small mixture of experts needs: vLLM's group of ranks
    for experts, which it makes where the engine's model has some.
    """
    if not composite.is_moe:
        most = max(config.get_num_experts() for config in configs.values())
        composite.model_arch_config.num_experts = most


def _read_positions_of_text(composite: "ModelConfig") -> None:
    """Positions have one dimension: of a model that also sees images, text alone is read."""
    for config in {id(c): c for c in (composite.hf_config, composite.hf_text_config)}.values():
        rope = getattr(config, "rope_parameters", None)
        if isinstance(rope, dict):
            rope.pop("mrope_section", None)
            rope.pop("mrope_interleaved", None)


def _fit_fused_all_reduce(vllm_config: "VllmConfig", configs: "dict[str, ModelConfig]") -> None:
    """Leave all-reduces unfused where a small member's rows are larger than the base's.

    FlashInfer has one workspace in a process, and vLLM makes it for the model compiled first, the
    base. A larger row does not fit, and a step that needs it raises.
    """
    fusion = vllm_config.compilation_config.pass_config
    if vllm_config.parallel_config.tensor_parallel_size == 1 or fusion.fuse_allreduce_rms is False:
        return
    sizes = {role: c.get_hidden_size() * c.dtype.itemsize for role, c in configs.items()}
    widest = max(ROLES, key=lambda role: sizes[role])
    if sizes[widest] > sizes["base"]:
        fusion.fuse_allreduce_rms = False
        logger.info(
            "All-reduces are not fused with norms: a row of the %s has %d bytes and one of the base"
            " %d, for which FlashInfer's workspace is made",
            widest,
            sizes[widest],
            sizes["base"],
        )
