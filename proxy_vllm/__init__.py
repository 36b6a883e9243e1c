"""proxy_vllm: proxy-tuned generation on vLLM, ``base + alpha * (expert - antiexpert)``.

Importing the package is cheap: vLLM and PyTorch load with the first name that needs them.
"""

from typing import TYPE_CHECKING, Any

from proxy_vllm.envs import prepare_process

if TYPE_CHECKING:
    from proxy_vllm.batch.ray_generator import ProxyGenerator
    from proxy_vllm.config import ProxyConfig
    from proxy_vllm.llm import ProxyLLM

__version__ = "0.1.0"
__all__ = ["ProxyConfig", "ProxyGenerator", "ProxyLLM", "__version__"]

prepare_process()

_LAZY = {
    "ProxyConfig": "proxy_vllm.config",
    "ProxyGenerator": "proxy_vllm.batch.ray_generator",
    "ProxyLLM": "proxy_vllm.llm",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
