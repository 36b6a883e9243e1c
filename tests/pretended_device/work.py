"""What a GPU's queue of work would suffer: waits, blocking copies, memory changed too early.

Work is asynchronous: memory that a launch reads in the host, and a copy to the host, are *pending*
until the host has waited for them. Memory that changes meanwhile is noted, and a copy that is read
too early is garbage. Streams carry vector clocks, so that work on one stream is ordered with
another's only where it waits for it. `record` stands in for a CUDA graph.
"""

import linecache
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_flatten

_FOLDER = Path(__file__).parent
_OWN = {str(_FOLDER / f"{name}.py") for name in ("device", "launcher", "machine", "work")}


class DeviceFault(RuntimeError):
    """What a GPU would raise, with the place that asked for it."""


@dataclass
class Seen:
    """What happened while `watch` was on; each entry names its place."""

    waits: Counter[str] = field(default_factory=Counter)  # the host waits for the device
    blocking: Counter[str] = field(default_factory=Counter)  # copies that hold the host up
    overwritten: Counter[str] = field(
        default_factory=Counter
    )  # memory changed under work in flight
    kernels: Counter[str] = field(default_factory=Counter)
    events_waited: int = 0

    def faults(self) -> list[str]:
        kinds = {
            "wait": self.waits,
            "blocking copy": self.blocking,
            "overwritten": self.overwritten,
        }
        return [f"{n}x {kind}: {what}" for kind, c in kinds.items() for what, n in c.items()]


@dataclass
class Pending:
    """Memory that a launch reads and that must stay as it is until the launch is done."""

    stream: "Stream"
    number: int
    memory: torch.Tensor
    before: torch.Tensor  # its bytes at launch
    place: str
    of_host: bool  # the host can change it; else only another stream's work can
    target: torch.Tensor | None = None  # of a copy to the host, written when the host has waited


class Ranges:
    """Memory of some tensors, found again from any view of it."""

    def __init__(self) -> None:
        self.ends: dict[int, tuple[int, Any]] = {}

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        self.ends[storage.data_ptr()] = (storage.nbytes(), storage)
        return tensor

    def hold(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self.ends


class State(threading.local):
    """Of the pretended machine; each thread that uses it has its own."""

    def __init__(self) -> None:
        self.seen: Seen | None = None
        self.capture: Capture | None = None
        self.pending: list[Pending] = []
        self.last_place = "the start"


state = State()
# Shared by threads: which CPU memory a GPU would reach, or hold in page-locked memory.
pinned = Ranges()
mapped = Ranges()  # host memory that kernels read in place (UVA)
weights = Ranges()  # parameters of models whose inside runs on the CPU


def place() -> str:
    """File, line and text of the nearest caller outside of this folder and PyTorch."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        inside = "/torch/" in file or "/triton/" in file or file in _OWN or file.startswith("<")
        if not inside and not file.endswith("/contextlib.py"):
            name = file.rsplit("site-packages/", 1)[-1]
            return f"{name}:{frame.f_lineno} {linecache.getline(file, frame.f_lineno).strip()}"
        frame = frame.f_back
    return "an unknown place"


class Stream:
    """A queue of work, and what of others' work is known to be done before it (a vector clock)."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.number = 0
        self.clock: dict[Stream, int] = {}

    def after(self, clock: "dict[Stream, int]") -> None:
        for stream, number in clock.items():
            self.clock[stream] = max(self.clock.get(stream, 0), number)

    def now(self) -> "dict[Stream, int]":
        return {**self.clock, self: self.number}

    def wait_stream(self, other: "Stream") -> None:
        self.after(other.now())

    def wait_event(self, event: "Event") -> None:
        self.after(event.clock)

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        note_wait("Stream.synchronize")
        finish(self.now())

    def query(self) -> bool:
        return True


class Event:
    """A point in a stream; the host may wait for it, which is how a step's results are fetched."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.clock: dict[Stream, int] = {}

    def record(self, stream: Stream | None = None) -> None:
        self.clock = (stream or streams.current).now()

    def wait(self, stream: Stream | None = None) -> None:
        (stream or streams.current).wait_event(self)

    def synchronize(self) -> None:
        if state.seen is not None:
            state.seen.events_waited += 1
        finish(self.clock)

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: "Event") -> float:
        return 1.0


class Streams(threading.local):
    def __init__(self) -> None:
        self.main = self.current = Stream()

    def set(self, stream: Stream) -> None:
        self.current = stream

    @contextmanager
    def using(self, stream: Stream | None) -> Iterator[None]:
        before, self.current = self.current, stream or self.current
        try:
            yield
        finally:
            self.current = before


streams = Streams()


def synchronize(*_: Any) -> None:
    """Of the whole device."""
    note_wait("synchronize")
    finish(None)


def done(pending: Pending, clock: dict[Stream, int] | None) -> bool:
    return clock is None or pending.number <= clock.get(pending.stream, 0)


def finish(clock: dict[Stream, int] | None) -> None:
    """The host has waited up to a point (None: for everything)."""
    compare(lambda p: True)
    for each in [p for p in state.pending if done(p, clock)]:
        if each.target is not None:
            each.target.copy_(each.before)
    state.pending = [p for p in state.pending if not done(p, clock)]


def compare(which: Callable[[Pending], bool]) -> None:
    """Note pending memory that is no longer what it was when its reader was launched."""
    for each in state.pending:
        if which(each) and changed(each):
            if state.seen is not None:
                state.seen.overwritten[
                    f"what was launched at {each.place} is not done, and its memory changed between"
                    f" {state.last_place} and {place()}"
                ] += 1
            each.before = each.memory.clone()  # told once


def changed(pending: Pending) -> bool:
    return not same_bytes(pending.memory, pending.before)


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        a.contiguous().view(-1).view(torch.uint8).equal(b.contiguous().view(-1).view(torch.uint8))
    )


@contextmanager
def launching(reads: list[torch.Tensor]) -> Iterator[None]:
    """Around one launch; ``reads`` are the CPU tensors inside its arguments."""
    if state.seen is None:
        yield
        return
    here, stream = place(), streams.current
    compare(lambda p: p.of_host)
    host = [t for t in reads if t.numel() and mapped.hold(t)]
    before = [t.clone() for t in host]
    yield
    stream.number += 1
    # A device may write mapped memory itself, in order with what it reads there.
    if any(not same_bytes(t, b) for t, b in zip(host, before, strict=True)):
        for each in state.pending:
            if each.of_host and mapped.hold(each.memory):
                each.before = each.memory.clone()
    known = stream.now()
    for each in state.pending:
        # This launch comes after what its stream knows to be done, and may write there.
        if not each.of_host and done(each, known) and changed(each):
            each.memory = each.before
    compare(lambda p: not p.of_host)
    for tensor in host:
        await_host(tensor, here)
    state.last_place = here


def await_host(memory: torch.Tensor, here: str, target: torch.Tensor | None = None) -> None:
    """Keep what the current launch reads until the host has waited for it."""
    stream = streams.current
    of_host = target is None
    state.pending.append(
        Pending(stream, stream.number, memory, memory.clone(), here, of_host, target)
    )


def note_wait(what: str) -> None:
    if state.capture is not None:
        raise DeviceFault(f"operation not permitted when stream is capturing: {what} at {place()}")
    if state.seen is not None:
        state.seen.waits[f"{what} at {place()}"] += 1


def note_blocking(what: str) -> None:
    if state.seen is not None:
        state.seen.blocking[f"{what} at {place()}"] += 1


def spoil(tensor: torch.Tensor, integers: bool = False) -> None:
    """A value that cannot go unnoticed."""
    if tensor.is_floating_point():
        tensor.fill_(float("nan"))
    elif integers and tensor.dtype != torch.bool:
        tensor.fill_(-(1 << 6))


@contextmanager
def watch() -> Iterator[Seen]:
    """Note what happens inside; all work is waited for at the end."""
    before, state.seen = state.seen, Seen()
    seen = state.seen
    try:
        yield seen
        finish(None)
    finally:
        state.pending.clear()
        state.seen = before


@dataclass
class Capture:
    """Launches of one capture, each with the addresses that came from outside of it."""

    launches: list[tuple] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    inside: dict[int, Any] = field(default_factory=dict)  # memory made here, kept so as to be told

    def launch(self, name: str, tensors: list[torch.Tensor], out: Any = None) -> None:
        outside = []
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self.inside:
                outside.append((tensor.data_ptr(), tuple(tensor.shape), tensor.stride()))
        known = {t.untyped_storage().data_ptr() for t in tensors}
        for made in tree_flatten(out)[0]:
            if isinstance(made, torch.Tensor):
                storage = made.untyped_storage()
                if storage.data_ptr() not in known:
                    self.inside[storage.data_ptr()] = storage
        self.launches.append((name, *outside))
        self.places.append(place())


@contextmanager
def capturing() -> Iterator[Capture]:
    state.capture = Capture()
    try:
        yield state.capture
    finally:
        state.capture = None


def record(work: Callable[[], None]) -> Callable[[], None]:
    """Stands in for a CUDA graph: what it returns runs the work again under a capture's rules.

    A replay that launches other kernels, or reads or writes at other addresses, raises.
    """
    work()
    with capturing() as first:
        work()

    def replay() -> None:
        with capturing() as again:
            work()
        for i, (want, got) in enumerate(zip(first.launches, again.launches)):
            if want != got:
                raise DeviceFault(
                    f"a graph was captured with {want}, and would now need {got}: {again.places[i]}"
                )
        if len(first.launches) != len(again.launches):
            raise DeviceFault(f"{len(first.launches)} launches captured, {len(again.launches)} now")

    return replay
