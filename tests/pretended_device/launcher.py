"""Triton's interpreter as a launcher on the device: refuses what Triton's own would refuse."""

from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from pretended_device.device import DeviceTensor, inner
from pretended_device.work import DeviceFault, launching, place, state, weights


def install() -> None:
    from triton.runtime import interpreter

    run = interpreter.GridExecutor.__call__

    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        name = self.fn.__name__
        named = [*zip(self.arg_names, args), *kwargs.items()]
        tensors = {key: value for key, value in named if isinstance(value, torch.Tensor)}
        for key, tensor in tensors.items():
            if not isinstance(tensor, DeviceTensor) and not weights.hold(tensor):
                raise DeviceFault(
                    f"Pointer argument {key} of {name} is not for Triton (cpu tensor?): {place()}"
                )
        for key, value in named:
            if not (
                value is None
                or isinstance(value, torch.Tensor)
                or type(value) in (int, float, bool, str)
            ):
                # NumPy's scalars and the like: Triton has no type for them.
                raise DeviceFault(
                    f"failed to specialize {key} of {name}, a {type(value).__name__}: {place()}"
                )
        if isinstance(self.grid, tuple) and any(type(size) is not int for size in self.grid):
            raise DeviceFault(f"the grid of {name} is {self.grid}: {place()}")
        if state.seen is not None:
            state.seen.kernels[name] += 1
        if state.capture is not None:
            state.capture.launch(name, list(tensors.values()))
        with launching([inner(t) for t in tensors.values()]), _disable_current_modes():
            return run(self, *inner(args), **inner(kwargs))

    interpreter.GridExecutor.__call__ = launch
