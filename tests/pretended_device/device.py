"""A pretended accelerator: tensors that say ``gpu:0`` and hold real values, under a GPU's rules.

`DeviceTensor` is a wrapper around a CPU tensor. While a `DispatchMode` is entered, every PyTorch
operation passes through `_dispatch`:

- arguments must be on one device, else it raises as PyTorch does;
- what makes the host wait (``item``, ``nonzero``, boolean masks, copies that block) is noted with
  file and line;
- in a capture, waiting and copies between host and device raise;
- fresh memory is NaN, so that reading what was never written shows.

PyTorch's PrivateUse1 backend for Python provides the device's name. `launcher.py` does the same for
Triton's kernels.
"""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from pretended_device.work import (
    DeviceFault,
    await_host,
    launching,
    note_blocking,
    note_wait,
    pinned,
    place,
    spoil,
    state,
    streams,
    weights,
)

_setup_privateuseone_for_python_backend("gpu")
DEVICE = torch.device("gpu:0")

# Operations that hand a value or a shape which depends on data to the host.
_WAITING = {
    "aten::_local_scalar_dense",
    "aten::_unique2",
    "aten::bincount",
    "aten::equal",
    "aten::is_nonzero",
    "aten::item",
    "aten::masked_select",
    "aten::nonzero",
    "aten::unique_consecutive",
    "aten::unique_dim",
}
_INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
_MASKS = (torch.bool, torch.uint8)


class DeviceTensor(torch.Tensor):
    """Says that it is on the device; its values are in the CPU tensor ``inner``."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "DeviceTensor":
        assert type(inner) is not DeviceTensor
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=DEVICE,
            requires_grad=False,
        )
        tensor.inner = inner
        return tensor

    def __repr__(self, **_: Any) -> str:
        return f"DeviceTensor({self.inner!r})"

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.inner.untyped_storage()

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert gpu:0 device type tensor to numpy")

    def tolist(self) -> Any:
        note_wait("tolist")
        return self.inner.tolist()

    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _dispatch(func, args, kwargs or {})


class DispatchMode(TorchDispatchMode):
    """Sends operations that only make tensors, or take none of ours, through the same rules."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _dispatch(func, args, kwargs or {})


def inner(tree: Any) -> Any:
    """A structure with each of our tensors replaced by the CPU tensor inside it."""
    return tree_map(lambda t: t.inner if isinstance(t, DeviceTensor) else t, tree)


def on_device(tree: Any) -> Any:
    """The opposite of `inner`."""
    return tree_map(
        lambda t: (
            DeviceTensor(t)
            if isinstance(t, torch.Tensor) and not isinstance(t, DeviceTensor)
            else t
        ),
        tree,
    )


def _device_of(kwargs: dict[str, Any]) -> torch.device | None:
    device = kwargs.get("device")
    return None if device is None else torch.device(device)


def _check_copy(
    source_on_device: bool, source: torch.Tensor, target_on_device: bool, non_blocking: bool
) -> None:
    if source_on_device == target_on_device:
        return
    if state.capture is not None:
        raise DeviceFault(f"a copy between host and device in a capture: {place()}")
    if not target_on_device:
        if not non_blocking:
            note_wait("copy to the host")
    elif not non_blocking or not pinned.hold(source):
        kind = "copy" if not non_blocking else "copy from memory that is not pinned"
        note_blocking(f"{kind} to the device")


def _dispatch(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    name = func.name().split(".")[0]
    flat, _ = tree_flatten((args, kwargs))
    tensors = [t for t in flat if isinstance(t, torch.Tensor)]
    ours = [t for t in tensors if isinstance(t, DeviceTensor)]
    others = [t for t in tensors if not isinstance(t, DeviceTensor)]
    if name == "aten::is_pinned":
        return not ours and pinned.hold(args[0])
    device = _device_of(kwargs)
    to_device = bool(ours)
    to_host = None  # the source of a copy to the host that does not block
    if name in ("aten::_to_copy", "aten::copy_"):
        source = args[1] if name == "aten::copy_" else args[0]
        non_blocking = kwargs.get("non_blocking", False)
        if name == "aten::copy_":
            to_device = isinstance(args[0], DeviceTensor)
            non_blocking = args[2] if len(args) > 2 else non_blocking
        elif device is not None:
            to_device = device.type == DEVICE.type
        _check_copy(isinstance(source, DeviceTensor), source, to_device, non_blocking)
        if isinstance(source, DeviceTensor) and not to_device and non_blocking:
            to_host = source
    elif device is not None:
        to_device = device.type == DEVICE.type
    elif ours and others:
        _check_devices(name, args, [t for t in others if t.dim() > 0 and not weights.hold(t)])
    if ours and name in _WAITING:
        note_wait(name)
    if ours and name == "aten::repeat_interleave" and kwargs.get("output_size") is None:
        note_wait(name)
    if ours and name in _INDEXING:
        index = [i for i in args[1] or [] if isinstance(i, DeviceTensor)]
        if any(i.dtype in _MASKS for i in index):
            note_wait("boolean mask index")
    pin = bool(kwargs.get("pin_memory"))
    call_args, call_kwargs = inner((args, kwargs))
    if pin:
        call_kwargs = {**call_kwargs, "pin_memory": False}
    if device is not None and device.type == DEVICE.type:
        call_kwargs = {**call_kwargs, "device": torch.device("cpu")}
    if not (ours or to_device):
        out = func(*call_args, **call_kwargs)
        return pinned.add(out) if pin else out
    with launching([t.inner for t in ours]):
        if state.seen is None or to_host is None:
            out = func(*call_args, **call_kwargs)
            if to_device and name in ("aten::_to_copy", "aten::copy_") and others:
                read = [t for t in others if pinned.hold(t) and t.numel()]
                if state.seen is not None and read:
                    await_host(read[0], place())
        else:
            out = _copy_later(name, to_host, call_args, call_kwargs, func)
    if state.capture is not None:
        state.capture.launch(name, ours, out)
    if name.startswith(("aten::empty", "aten::new_empty")) and torch.is_tensor(out):
        spoil(out)
    if not to_device:
        return out
    same = {id(t.inner): t for t in ours}

    def wrap(t: Any) -> Any:
        if not isinstance(t, torch.Tensor) or isinstance(t, DeviceTensor):
            return t
        return same.get(id(t)) or DeviceTensor(t)

    # The same object where an operation works in place.
    return tree_map(lambda t: same[id(t)] if id(t) in same else wrap(t), out)


def _check_devices(name: str, args: tuple, on_host: list[torch.Tensor]) -> None:
    if not on_host:
        return
    if name in _INDEXING:
        if not isinstance(args[0], DeviceTensor):
            raise DeviceFault(f"indices on gpu:0, tensor on cpu: {place()}")
        note_blocking("index that is on the host")
        return
    raise DeviceFault(
        "Expected all tensors to be on the same device, but found at least two devices, gpu:0 and"
        f" cpu: {name} at {place()}"
    )


def _copy_later(
    name: str, source: DeviceTensor, args: tuple, kwargs: dict, func: Any
) -> torch.Tensor:
    """A copy to the host that is done when the host waits; garbage until then."""
    if name == "aten::copy_":
        target = args[0]
    else:
        target = func(*args, **kwargs)
        if target.untyped_storage().data_ptr() == source.untyped_storage().data_ptr():
            target = target.clone()
    converted = source.inner.to(target.dtype).expand_as(target)
    spoil(target, integers=True)
    # Numbered after the launch that it is.
    streams.current.number += 1
    memory = source.inner if source.dtype == target.dtype else converted
    await_host(memory, place(), target)
    streams.current.number -= 1
    return target
