"""The processes of an engine end with the command that started them, and the command with them."""

import asyncio
import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from typing import Any, NoReturn

from proxy_vllm.envs import ENDS_WITH_PARENT

# What vLLM calls processes that it starts: engines, their workers, and further HTTP servers.
_NAMES = ("EngineCore", "VllmWorker", "ApiServer")
# The title that vLLM gives an engine's process; Linux shows 15 characters of it.
_TITLE = "VLLM::EngineCor"
_SECONDS_BETWEEN_LOOKS = 0.5
# How long vLLM may take to end a command whose engine has ended, and one that was told to end while
# its engine was loading.
_SECONDS_TO_END = 60.0
_SECONDS_TO_STOP_LOADING = 5.0
_THREAD = "proxy-vllm-parent"

# Whether this process is the command `serve`: others have handlers of their own.
_serves = False
# When SIGTERM came while the engine was loading.
_told_to_end: float | None = None


def mark_children() -> None:
    """Have the processes of engines that this process starts call ``end_with_parent``.

    They are spawned, as on a CPU and under `vllm serve` anyway: only then does vLLM load its
    plugins in each of them.
    """
    os.environ[ENDS_WITH_PARENT] = "1"
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")


def end_with_parent() -> None:
    """In a process of a proxy-tuned engine, kill it when the process that started it is gone.

    vLLM tells its processes to end when Python exits, which a kill passes by: they would keep a
    GPU's memory. This looks for the parent again and again. Linux's own signal for it
    (``PR_SET_PDEATHSIG``) comes at the end of the *thread* that started a process.
    """
    parent = multiprocessing.parent_process()
    if parent is None or os.environ.get(ENDS_WITH_PARENT) != "1":
        return
    if not multiprocessing.current_process().name.startswith(_NAMES):
        return  # started by the user, and not by vLLM
    if any(thread.name == _THREAD for thread in threading.enumerate()):
        return
    threading.Thread(target=_watch, args=(parent.pid,), daemon=True, name=_THREAD).start()


def _watch(parent: int | None) -> None:
    while os.getppid() == parent:
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    os.kill(os.getpid(), signal.SIGKILL)


def end_with_engines(patience: float = _SECONDS_TO_END, *, serves: bool = False) -> None:
    """End this command, in one line, if it goes on for long after an engine of its own ended.

    An engine that ends while it starts leaves vLLM waiting for its first message: ten minutes, or
    what ``VLLM_ENGINE_READY_TIMEOUT_S`` says.
    """
    global _serves
    _serves = serves
    threading.Thread(
        target=_watch_engines, args=(patience,), daemon=True, name="proxy-vllm-engines"
    ).start()


def heed_sigterm() -> None:
    """Have SIGTERM end a server of ours whose engine is still loading.

    vLLM's handler for that time raises ``KeyboardInterrupt``, which its wait for the engine's first
    messages swallows (``zmq_socket_ctx``): the command went on, and served. This is called while
    vLLM completes the engine's configuration, after it has set its handler and before it waits. The
    running server sets another one. With several servers, the process that starts them runs no
    event loop, and has a handler that is heard and stays.
    """
    if not _serves or threading.current_thread() is not threading.main_thread():
        return
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    if callable(signal.getsignal(signal.SIGTERM)):  # else the signal ends the process by itself
        signal.signal(signal.SIGTERM, _end_loading)


def _end_loading(number: int, frame: Any) -> None:
    global _told_to_end
    _told_to_end = time.monotonic()
    raise SystemExit(128 + number)


def _watch_engines(patience: float) -> None:
    import psutil

    this, engines = psutil.Process(), set[psutil.Process]()
    ended = None
    while True:
        time.sleep(_SECONDS_BETWEEN_LOOKS)
        if _told_to_end and time.monotonic() - _told_to_end > _SECONDS_TO_STOP_LOADING:
            # vLLM would wait for the loading engine, which hears no signal.
            _leave(this, 128 + signal.SIGTERM)
        if not engines:
            with contextlib.suppress(psutil.Error):
                engines = {p for p in this.children() if p.name().startswith(_TITLE)}
        elif not all(map(_runs, engines)):
            ended = ended or time.monotonic()
            if time.monotonic() - ended > patience:
                break
    print(
        "proxy-vllm: error: the engine ended, and its last messages above name the cause",
        file=sys.stderr,
        flush=True,
    )
    _leave(this, 2)


def _leave(this: Any, status: int) -> NoReturn:
    """End this process and all that it started, now."""
    import psutil

    for process in this.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            process.kill()
    os._exit(status)


def _runs(process: Any) -> bool:
    import psutil

    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False
