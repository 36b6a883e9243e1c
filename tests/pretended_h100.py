"""Eight H100s that exist for vLLM's configuration alone: import this before vLLM and proxy_vllm.

For processes of their own. No tensor can be put on these devices.
"""

# ruff: noqa: E402  the order of imports is what this module is about

import sys
import types
from types import SimpleNamespace


def _refuse(*args, **kwargs):
    raise RuntimeError("a kernel was called on a pretended device")


# What vLLM imports of its CUDA build: modules and functions that only exist.
_NAMES = {
    "vllm._C_stable_libtorch": {},
    "vllm._moe_C_stable_libtorch": {},
    "vllm.vllm_flash_attn": {
        "flash_attn_varlen_func": _refuse,
        "get_scheduler_metadata": _refuse,
        "compile_flash_attn_varlen_func_from_specs": None,
        "fa_version_unsupported_reason": lambda version: None if version == 3 else "not on Hopper",
        "is_fa_version_supported": lambda version, *args: version in (2, 3),
    },
}
_NAMES["vllm.vllm_flash_attn.flash_attn_interface"] = _NAMES["vllm.vllm_flash_attn"]
for _name, _contents in _NAMES.items():
    _module = sys.modules[_name] = types.ModuleType(_name)
    vars(_module).update(_contents)

import triton.backends as triton_backends


class _Driver:
    @staticmethod
    def is_active() -> bool:
        return True


_nvidia = triton_backends.backends["nvidia"]
triton_backends.backends["nvidia"] = SimpleNamespace(compiler=_nvidia.compiler, driver=_Driver)

import vllm.platforms
from vllm.platforms.cuda import CudaPlatformBase
from vllm.platforms.interface import DeviceCapability


class PretendedH100(CudaPlatformBase):
    capability = DeviceCapability(9, 0)

    @classmethod
    def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
        return cls.capability

    @classmethod
    def has_device_capability(cls, capability, device_id: int = 0) -> bool:
        if not isinstance(capability, tuple):
            capability = divmod(capability, 10)
        return cls.capability >= capability

    @classmethod
    def get_device_name(cls, device_id: int = 0) -> str:
        return "NVIDIA H100 80GB HBM3"

    @classmethod
    def get_device_total_memory(cls, device_id: int = 0) -> int:
        return 80 << 30

    @classmethod
    def is_fully_connected(cls, physical_device_ids) -> bool:
        return True

    @classmethod
    def device_count(cls) -> int:
        return 8

    @classmethod
    def get_device_uuid(cls, device_id: int = 0) -> str:
        return f"GPU-pretended-{device_id}"

    @classmethod
    def num_compute_units(cls, device_id: int = 0) -> int:
        return 132


vllm.platforms._current_platform = PretendedH100()

import torch._ops
import vllm._custom_ops


class _Kernel:
    """A CUDA kernel that vLLM names while it is imported; none is supported where it asks."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __getattr__(self, part: str) -> "_Kernel":
        if part.startswith("__"):
            raise AttributeError(part)
        return _Kernel(f"{self.name}.{part}")

    def __call__(self, *args, **kwargs):
        if "support" in self.name:
            return False
        return _refuse()


def _kernel_or_stub(self, name, _real=torch._ops._OpNamespace.__getattr__):
    try:
        return _real(self, name)
    except AttributeError:
        if self.name not in ("_C", "_moe_C", "_C_cache_ops", "_C_custom_ar") or "__" in name:
            raise
        return _Kernel(name)


torch._ops._OpNamespace.__getattr__ = _kernel_or_stub

import vllm.utils.flashinfer

vllm.utils.flashinfer.has_flashinfer = lambda: True
