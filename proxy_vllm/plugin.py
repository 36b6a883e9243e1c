"""The `vllm.general_plugins` entry point: vLLM calls it in every process that it starts."""

from proxy_vllm.config import ARCHITECTURE
from proxy_vllm.lifetime import end_with_parent


def register() -> None:
    """Register the composite model with vLLM. Safe to call any number of times."""
    from vllm import ModelRegistry

    from proxy_vllm.composite import engine_config

    end_with_parent()
    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, f"proxy_vllm.composite.model:{ARCHITECTURE}")
    engine_config.register()
