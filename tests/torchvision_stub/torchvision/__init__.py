"""Stands for torchvision where models that also see images read text alone: nothing here runs.

Put the folder above on the path where the real package does not fit beside PyTorch's CPU build.
"""

import sys
from enum import Enum
from types import ModuleType
from typing import Any

__version__ = "0.28.0"
InterpolationMode = Enum(
    "InterpolationMode", "NEAREST NEAREST_EXACT BILINEAR BICUBIC BOX HAMMING LANCZOS"
)


class _Absent:
    """A function or class that exists by name."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("this torchvision is a stub, for tests that read text alone")


class _Module(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name == "__path__":
            return []
        if name.startswith("__"):
            raise AttributeError(name)
        return InterpolationMode if name == "InterpolationMode" else _Absent


_NAMES = ("io", "transforms", "transforms.functional", "transforms.v2", "transforms.v2.functional")
for _name in _NAMES:
    _full = f"{__name__}.{_name}"
    sys.modules[_full] = _Module(_full)
    _parent, _, _last = _full.rpartition(".")
    setattr(sys.modules[_parent], _last, sys.modules[_full])
