"""vLLM's Model Runner V2 on the pretended device, and what stands between them.

Everything that proxy_vllm and vLLM's runner do is on the device: requests' state, inputs, block
tables, the composite's forward, packing, sampling, fetching results. The insides of the three
members and of attention are vLLM's CPU kernels, which run on plain tensors (`_crossing`). Import
this before vLLM: it replaces names of PyTorch that vLLM binds.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch

assert "vllm" not in sys.modules, "import the pretended device before vLLM"
# Wrapped tensors have version counters, which tensors of inference mode have not.
torch.inference_mode = lambda *args, **kwargs: torch.no_grad()

from torch.utils._python_dispatch import _disable_current_modes  # noqa: E402
from vllm import platforms  # noqa: E402
from vllm.platforms.cpu import CpuPlatform  # noqa: E402

from pretended_device import launcher, work  # noqa: E402
from pretended_device.device import (  # noqa: E402
    DEVICE,
    DeviceTensor,
    DispatchMode,
    inner,
    on_device,
)


class PretendedPlatform(CpuPlatform):
    """A CPU with page-locked memory, whose engines schedule a step while one runs, as on a GPU."""

    @classmethod
    def is_pin_memory_available(cls) -> bool:
        return True

    @classmethod
    def check_and_update_config(cls, vllm_config: Any) -> None:
        super().check_and_update_config(vllm_config)
        vllm_config.scheduler_config.async_scheduling = True


def _install() -> None:
    platforms._current_platform = PretendedPlatform()
    import vllm.utils.torch_utils as torch_utils
    import vllm.v1.worker.gpu.buffer_utils as buffers

    copy_to_device, uva_buffer = torch_utils.async_tensor_h2d, buffers.UvaBuffer
    import vllm.v1.worker.cpu.shm  # noqa: F401  replaces these by a CPU's

    torch_utils.async_tensor_h2d = copy_to_device
    buffers.UvaBuffer = uva_buffer
    buffers.get_accelerator_view_from_cpu_tensor = lambda t: DeviceTensor(work.mapped.add(t))

    torch.cuda.Stream, torch.cuda.Event = work.Stream, work.Event
    torch.Event = work.Event
    torch.cuda.current_stream = lambda *_: work.streams.current
    torch.cuda.set_stream = work.streams.set
    torch.cuda.stream = work.streams.using
    torch.accelerator.synchronize = work.synchronize
    torch.cuda.synchronize = work.synchronize
    torch.Tensor.pin_memory = lambda self, *_: work.pinned.add(self.clone())
    launcher.install()

    import vllm.model_executor.layers.attention.mla_attention as latent_attention
    import vllm.model_executor.model_loader.base_loader as loader
    import vllm.v1.worker.gpu.model_runner as runner
    import vllm.v1.worker.gpu.sample.sampler as sampler
    import vllm.v1.worker.gpu.sample.states as states
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p_pytorch
    from vllm.v1.worker.utils import AttentionGroup

    import proxy_vllm.adapters.manager as adapters
    import proxy_vllm.composite.model as composite
    import proxy_vllm.worker.cpu_worker as cpu_worker

    for name in ("build_metadata", "build_metadata_for_cudagraph_capture"):
        setattr(AttentionGroup, name, _of_plain_metadata(getattr(AttentionGroup, name)))
    runner.init_kv_cache = _on_cpu(runner.init_kv_cache)
    runner.init_attn_backend = _on_cpu(runner.init_attn_backend)
    loader.BaseModelLoader.load_model = _loading(loader.BaseModelLoader.load_model)
    composite.build_member = _building(composite.build_member)
    composite.build_sharing = _building(composite.build_sharing)
    # Adapters are inside of the expert.
    adapters.ExpertAdapterWorker.__init__ = _on_cpu(adapters.ExpertAdapterWorker.__init__)
    for name in ("create_lora_manager", "set_active_adapters", "add_adapter"):
        method = getattr(adapters.ExpertAdapterWorker, name)
        setattr(adapters.ExpertAdapterWorker, name, _plainly(method))
    # Its metadata is made outside of the device, where no memory can be pinned for a pretended one.
    latent_attention.PIN_MEMORY = False
    # vLLM's own Triton filter does not run in the interpreter.
    sampler.apply_top_k_top_p = states.apply_top_k_top_p = apply_top_k_top_p_pytorch

    def make_runner(self: Any) -> Any:
        return cpu_worker.ProxyCPUModelRunnerV2(self.vllm_config, DEVICE)

    cpu_worker.ProxyCPUWorker._make_model_runner = make_runner


def _tensor(
    make: Callable,
    data: Any,
    *args: Any,
    device: Any = None,
    pin_memory: bool = False,
    **kwargs: Any,
) -> Any:
    """`torch.tensor`, which asks the device by a way that no dispatch sees."""
    if device is None or torch.device(device).type != DEVICE.type:
        out = make(data, *args, device=device, **kwargs)
        return _pinned(out) if pin_memory else out
    return make(data, *args, **kwargs).to(DEVICE)  # a copy from memory that is not pinned


def _pinned(tensor: torch.Tensor) -> torch.Tensor:
    return work.pinned.add(tensor)


def _on_cpu(function: Callable) -> Callable:
    """Of `(x, y, device, ...)`, with a CPU as the device."""

    def call(first: Any, second: Any, _: torch.device, *args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return function(first, second, torch.device("cpu"), *args, **kwargs)

    return call


def _plainly(method: Callable) -> Callable:
    def call(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return method(*args, **kwargs)

    return call


def _of_plain_metadata(method: Callable) -> Callable:
    def call(self: Any, metadata: Any, *args: Any, **kwargs: Any) -> Any:
        plain = {f.name: inner(getattr(metadata, f.name)) for f in fields(metadata) if f.init}
        with _disable_current_modes():
            return method(self, replace(metadata, **plain), *args, **kwargs)

    return call


def _loading(method: Callable) -> Callable:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            model = method(self, *args, **kwargs)
            for parameter in model.parameters():
                work.weights.add(parameter.data)
        if not hasattr(model, "proxy_config"):
            _cross(model)  # one that drafts
        return model

    return call


def _building(build: Callable) -> Callable:
    """Members whose methods take and give tensors of the device."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            member = build(*args, **kwargs)
        _cross(member)
        return member

    return call


def _make_plain(metadata: Any) -> None:
    """Of layers with states, whose builders keep buffers on the device."""
    for one in (metadata or {}).values():
        for name, value in vars(one).items():
            setattr(one, name, inner(value))


def _cross(model: torch.nn.Module) -> None:
    for name in ("forward", "compute_logits", "compute_logits_local"):
        if hasattr(model, name):
            setattr(model, name, _crossing(name, getattr(model, name)))


def _crossing(name: str, method: Callable) -> Callable:
    from vllm.forward_context import get_forward_context, is_forward_context_available
    from vllm.sequence import IntermediateTensors

    def call(*args: Any, **kwargs: Any) -> Any:
        context = get_forward_context() if is_forward_context_available() else None
        slots = context.slot_mapping if context is not None else None
        if slots is not None:
            context.slot_mapping = inner(slots)
        if context is not None:
            _make_plain(context.attn_metadata)
        try:
            with work.launching([]), _disable_current_modes():
                out = method(*inner(args), **inner(kwargs))
        finally:
            if slots is not None:
                context.slot_mapping = slots
        if work.state.capture is not None:
            made = out.tensors if isinstance(out, IntermediateTensors) else out
            work.state.capture.launch(name, [], made)
        if isinstance(out, IntermediateTensors):
            return IntermediateTensors(on_device(out.tensors))
        return on_device(out)

    return call


@contextmanager
def engine(**kwargs: Any) -> Iterator[tuple[Any, Any]]:
    """A ``ProxyLLM`` on the device and its model runner, gone when the block ends."""
    from engines import running

    mode, make = DispatchMode(), torch.tensor
    mode.__enter__()
    torch.tensor = partial(_tensor, make)
    try:
        with running(**kwargs) as llm:
            core = llm.llm_engine.engine_core.engine_core
            yield llm, core.model_executor.driver_worker.worker.model_runner
    finally:
        torch.tensor = make
        mode.__exit__(None, None, None)


os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
_install()
