"""A process of its own for one engine: for the demo, and for the benchmarks in `scripts/`."""

import atexit
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil


class ChildFailed(RuntimeError):
    """A call failed, or its process ended; the message holds the end of what it printed."""


class ChildProcess:
    """A process for one engine, which takes the device's memory with it when it ends.

    Calls run there one after another, and leave globals behind for the next call. What it prints
    goes to a file, whose end is shown when a call fails.

    Args:
        environment: variables that the process has besides those of this one.
        quiet: keep what it prints; otherwise it prints to standard error.
    """

    def __init__(self, environment: Mapping[str, str] | None = None, *, quiet: bool = True) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="proxy-vllm-")
        self._log = Path(self._folder.name, "log") if quiet else None
        self._pool = ProcessPoolExecutor(1, get_context("spawn"), _print_to, (self._log,))
        with patch.dict(os.environ, environment or {}):  # the process starts with its first call
            self.pid = self._pool.submit(os.getpid).result()

    def start(self, function: Callable[..., Any], *args: Any) -> Future[Any]:
        """Begin a call; `result` waits for it."""
        return self._pool.submit(function, *args)

    def result(self, call: Future[Any]) -> Any:
        """What a call returns; raises `ChildFailed` if it fails."""
        try:
            return call.result()
        except (Exception, SystemExit) as error:
            said = self._log.read_text(errors="replace")[-4000:] if self._log else ""
            raise ChildFailed(f"{error}\n{said}".rstrip()) from error

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        return self.result(self.start(function, *args))

    def __enter__(self) -> "ChildProcess":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:  # a call may still be running, for as long as it takes
            with suppress(psutil.NoSuchProcess):
                child = psutil.Process(self.pid)
                for process in [*child.children(recursive=True), child]:
                    process.kill()
        # vLLM ends an engine's process when Python exits, and children of `multiprocessing` leave
        # without that: they would wait for the engine for ever.
        with suppress(Exception):  # it ended by itself, and the failed call says why
            self._pool.submit(atexit._run_exitfuncs).result()
        self._pool.shutdown()
        self._folder.cleanup()


def _print_to(log: Path | None) -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    if log is None:
        os.dup2(2, 1)
        return
    with log.open("a") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
