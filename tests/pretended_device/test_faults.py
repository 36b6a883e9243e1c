"""Planted faults: what the pretended device must catch, each with its place."""

from collections.abc import Callable, Iterator

import pytest
import torch
from engines import greedy_params
from vllm.triton_utils import tl, triton

from pretended_device import machine
from pretended_device.device import DEVICE, DispatchMode
from pretended_device.work import DeviceFault, Event, Stream, mapped, record, streams, watch


@pytest.fixture
def mode() -> Iterator[None]:
    with DispatchMode():
        yield


def device_tensor(count: int = 4, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(count, dtype=dtype, device=DEVICE)


@triton.jit
def _double_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    tl.store(out_ptr + index, 2 * tl.load(x_ptr + index))


WAITS: dict[str, Callable[[torch.Tensor], object]] = {
    "item": lambda x: x[0].item(),
    "int": lambda x: int(x[0]),
    "bool": lambda x: bool(x[0] > 0),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "boolean mask": lambda x: x[x > 0],
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "repeat_interleave": lambda x: x.repeat_interleave(x.long()),
    "equal": lambda x: torch.equal(x, x),
    "synchronize": lambda x: torch.accelerator.synchronize(),
}


@pytest.mark.parametrize("name", WAITS)
def test_a_wait_is_seen_with_its_place(mode, name):
    x = device_tensor()
    with watch() as seen:
        WAITS[name](x)
    assert seen.waits and all("test_faults.py" in place for place in seen.waits), seen
    with pytest.raises(DeviceFault, match=r"captur.*test_faults.py"):
        record(lambda: WAITS[name](x))


BLOCKING: dict[str, Callable[[torch.Tensor], object]] = {
    "to": lambda x: torch.ones(4).to(DEVICE),
    "not pinned": lambda x: torch.ones(4).to(DEVICE, non_blocking=True),
    "copy_": lambda x: x.copy_(torch.ones(4)),
    "host index": lambda x: x[torch.tensor([1, 2])],
}


@pytest.mark.parametrize("name", BLOCKING)
def test_a_copy_that_blocks_is_seen_with_its_place(mode, name):
    x = device_tensor()
    with watch() as seen:
        BLOCKING[name](x)
    assert len(seen.blocking) == 1 and "test_faults.py" in next(iter(seen.blocking)), seen


def test_a_copy_from_pinned_memory_is_none(mode):
    source = torch.ones(4, pin_memory=True)
    with watch() as seen:
        assert source.is_pinned() and not torch.ones(4).is_pinned()
        x = source.to(DEVICE, non_blocking=True)
    assert not seen.faults() and x.device == DEVICE


def test_two_devices_in_one_operation(mode):
    with pytest.raises(DeviceFault, match=r"same device.*test_faults.py"):
        device_tensor() + torch.ones(4)
    assert (device_tensor() + torch.tensor(1.0)).device == DEVICE  # a number is none


def test_a_kernel_takes_tensors_of_the_device_and_plain_numbers(mode):
    import numpy as np

    x, out = device_tensor(), device_tensor()
    _double_kernel[(1,)](x, out, BLOCK=4)
    assert out.inner.tolist() == [2.0] * 4
    with pytest.raises(DeviceFault, match=r"x_ptr of _double_kernel .*test_faults.py"):
        _double_kernel[(1,)](torch.ones(4), out, BLOCK=4)
    with pytest.raises(DeviceFault, match="grid"):
        _double_kernel[(np.int64(1),)](x, out, BLOCK=4)


def test_fresh_memory_is_nan(mode):
    assert torch.empty(3, device=DEVICE).inner.isnan().all()
    assert device_tensor().new_empty(3).inner.isnan().all()


class TestCaptures:
    def test_a_copy_from_the_host(self, mode):
        source, x = torch.ones(4, pin_memory=True), device_tensor()
        with pytest.raises(DeviceFault, match="copy between host and device in a capture"):
            record(lambda: x.copy_(source, non_blocking=True))

    def test_other_addresses(self, mode):
        inputs, out = [device_tensor(), device_tensor()], device_tensor()
        replay = record(lambda: out.copy_(inputs[0] + 1))
        replay()
        inputs.reverse()
        with pytest.raises(DeviceFault, match=r"captured with .*test_faults.py"):
            replay()

    def test_a_kernel_at_other_addresses(self, mode):
        inputs, out = [device_tensor(), device_tensor()], device_tensor()
        replay = record(lambda: _double_kernel[(1,)](inputs[0], out, BLOCK=4))
        inputs.reverse()
        with pytest.raises(DeviceFault, match="captured with"):
            replay()

    def test_more_launches(self, mode):
        out, times = device_tensor(), [1]
        replay = record(lambda: [out.add_(1) for _ in range(times[0])])
        times[0] = 2
        with pytest.raises(DeviceFault, match="launches captured"):
            replay()


class TestInFlight:
    def test_memory_that_a_kernel_reads_in_the_host(self, mode):
        host = mapped.add(torch.ones(4))
        view, out = machine.DeviceTensor(host), device_tensor()
        with watch() as seen:
            _double_kernel[(1,)](view, out, BLOCK=4)
            host.numpy()[2] = 7.0
            _double_kernel[(1,)](out, out, BLOCK=4)
        (found,) = seen.overwritten
        assert found.count("test_faults.py") == 3, found

    def test_none_when_the_host_has_waited(self, mode):
        host = mapped.add(torch.ones(4))
        view, out = machine.DeviceTensor(host), device_tensor()
        with watch() as seen:
            _double_kernel[(1,)](view, out, BLOCK=4)
            event = Event()
            event.record()
            event.synchronize()
            host.numpy()[2] = 7.0
        assert not seen.faults()

    def test_a_pinned_source(self, mode):
        source = torch.ones(4, pin_memory=True)
        with watch() as seen:
            source.to(DEVICE, non_blocking=True)
            source.fill_(3.0)
        assert seen.overwritten

    @pytest.mark.parametrize("waits", [False, True])
    def test_a_result_that_is_overwritten_while_it_is_fetched(self, mode, waits):
        """The main stream goes on while another copies, unless it waits for it."""
        result, side, main = device_tensor(), Stream(), streams.current
        with watch() as seen:
            side.wait_stream(main)
            with streams.using(side):
                fetched = result.to("cpu", non_blocking=True)
            if waits:
                main.wait_stream(side)
            result.add_(1)
            assert fetched.isnan().all(), "read before the host has waited"
        assert bool(seen.overwritten) is not waits
        assert not waits or fetched.tolist() == [1.0] * 4


class TestInAnEngine:
    """The same through whole steps, where the place must be the line that did it."""

    @pytest.fixture(scope="class")
    def engine(self, trio):
        with machine.engine(**trio) as started:
            yield started

    def generate(self, llm, count: int = 4) -> None:
        llm.generate(
            [{"prompt_token_ids": [5 + i, 6, 7]} for i in range(count)],
            [greedy_params(3 + i % 4, proxy_alpha=0.5 + i / 4) for i in range(count)],
            use_tqdm=False,
        )

    def test_a_wait(self, engine, monkeypatch):
        llm, runner = engine
        prepare = runner.model_state.prepare_inputs

        def waiting(batch, states):
            assert int(batch.seq_lens[0]) >= 0
            return prepare(batch, states)

        monkeypatch.setattr(runner.model_state, "prepare_inputs", waiting)
        with watch() as seen:
            self.generate(llm)
        assert len(seen.faults()) == 1 and "int(batch.seq_lens[0])" in seen.faults()[0]

    def test_parameters_in_one_buffer(self, engine, monkeypatch):
        """Alpha with one buffer instead of two: the next step's is written under this one's."""
        llm, runner = engine
        monkeypatch.setattr(runner.model_state.alpha.pool, "max_concurrency", 1)
        with watch() as seen:
            self.generate(llm, 12)  # more than slots, so that alpha changes between steps
        assert seen.overwritten

    def test_tokens_of_a_graph_that_are_not_copied(self, engine, monkeypatch):
        llm, runner = engine
        with torch.no_grad():
            runner.capture_sampler([1, 2, 4, 8], record)
        graphs = runner.sampler_graphs
        sample = graphs.sample

        def uncopied(*args):
            return graphs.tokens[: len(sample(*args))]

        monkeypatch.setattr(graphs, "sample", uncopied)
        try:
            with watch() as seen:
                self.generate(llm)
            assert seen.overwritten
        finally:
            runner.sampler_graphs = None
