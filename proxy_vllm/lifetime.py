"""The processes of an engine end with the process that started them, however that one ends."""

import multiprocessing
import os
import signal
import threading
import time

from proxy_vllm.envs import ENDS_WITH_PARENT

# What vLLM calls processes that it starts: engines, their workers, and further HTTP servers.
_NAMES = ("EngineCore", "VllmWorker", "ApiServer")
_SECONDS_BETWEEN_LOOKS = 0.5
_THREAD = "proxy-vllm-parent"


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
