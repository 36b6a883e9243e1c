"""What the members ask of the engine's configuration, through vLLM's hook for architectures.

vLLM keeps such hooks in a table keyed by architecture, and knows the composite by its own name
alone. The hook of the composite runs those of its members.
"""

from typing import TYPE_CHECKING

from vllm.logger import init_logger
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

from proxy_vllm.config import ARCHITECTURE, ROLES, ProxyConfig

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

logger = init_logger(f"vllm.{__name__}")


class CompositeConfig(VerifyAndUpdateConfig):
    """Called by vLLM while it completes an engine's configuration, in every process."""

    @staticmethod
    def verify_and_update_config(vllm_config: "VllmConfig") -> None:
        from proxy_vllm.composite.member_configs import member_model_configs

        proxy = ProxyConfig.from_vllm_config(vllm_config)
        configs = member_model_configs(vllm_config.model_config, proxy)
        _fit_fused_all_reduce(vllm_config, configs)


def register() -> None:
    MODELS_CONFIG_MAP[ARCHITECTURE] = CompositeConfig


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
