"""Processes of engines and commands end with each other; real processes without an engine."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from proxy_vllm.envs import ENDS_WITH_PARENT

START = """
import multiprocessing, os, sys, time
from proxy_vllm import lifetime

def engine(name):
    import setproctitle
    setproctitle.setproctitle(name)
    lifetime.end_with_parent()
    print(os.getpid(), flush=True)
    time.sleep(float(sys.argv[2]))

if __name__ == "__main__":
    if sys.argv[3] == "ours":
        lifetime.mark_children()
    if sys.argv[4:]:
        lifetime.end_with_engines(patience=1)
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=engine, args=("VLLM::EngineCore",), name=sys.argv[1])
    process.start()
    time.sleep(60)
"""


@pytest.fixture
def start(tmp_path):
    """Start a command with one process; the command and that process."""
    script = tmp_path / "command.py"
    script.write_text(START)
    started = []

    def run(*arguments):
        command = subprocess.Popen(
            [sys.executable, str(script), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # As it was before engines of other tests in this process.
            env={k: v for k, v in os.environ.items() if k != ENDS_WITH_PARENT},
        )
        child = psutil.Process(int(command.stdout.readline()))
        started.extend([command, child])
        return command, child

    yield run
    for process in started:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    for process in started:
        process.wait(timeout=10)


@pytest.mark.parametrize("name", ["EngineCore", "ApiServer_0"])
def test_a_process_of_an_engine_ends_with_the_one_that_started_it(start, name):
    command, child = start(name, "60", "ours")
    os.kill(command.pid, signal.SIGKILL)
    child.wait(timeout=10)


@pytest.mark.parametrize("name, whose", [("Process-1", "ours"), ("EngineCore", "others")])
def test_other_processes_are_left_alone(start, name, whose):
    """Those that a user started, and those of plain vLLM engines beside the package."""
    command, child = start(name, "60", whose)
    os.kill(command.pid, signal.SIGKILL)
    command.wait(timeout=10)
    time.sleep(1.5)
    assert child.is_running() and child.status() != psutil.STATUS_ZOMBIE


def test_a_command_does_not_outlive_its_engine(start):
    """vLLM waits ten minutes for the first message of an engine that ended while it started."""
    command, _ = start("EngineCore", "1", "ours", "ends")
    assert command.wait(timeout=20) == 2
    said = command.stderr.read().strip().splitlines()
    assert said[-1] == (
        "proxy-vllm: error: the engine ended, and its last messages above name the cause"
    )


LOADS = """
import asyncio, contextlib, signal, sys, time
from proxy_vllm import lifetime

def interrupt(*_):
    raise KeyboardInterrupt

async def heed():
    lifetime.heed_sigterm()

if __name__ == "__main__":
    what = sys.argv[1]
    signal.signal(signal.SIGTERM, interrupt)
    lifetime.end_with_engines(serves=what != "another command")
    lifetime.heed_sigterm() if what == "several servers" else asyncio.run(heed())
    if what in ("another command", "several servers"):
        sys.exit(signal.getsignal(signal.SIGTERM) is not interrupt)
    print("waits", flush=True)
    swallowed = {"KeyboardInterrupt": KeyboardInterrupt, "all": BaseException}[what]
    while True:
        with contextlib.suppress(swallowed):
            time.sleep(60)
"""


@pytest.mark.parametrize("swallowed", ["KeyboardInterrupt", "all"])
def test_sigterm_ends_a_command_that_loads(tmp_path, swallowed):
    """vLLM's wait for an engine swallows the exception of vLLM's own handler."""
    script = tmp_path / "command.py"
    script.write_text(LOADS)
    command = subprocess.Popen(
        [sys.executable, str(script), swallowed], stdout=subprocess.PIPE, text=True
    )
    try:
        assert command.stdout.readline() == "waits\n"
        command.terminate()
        assert command.wait(timeout=20) == 128 + signal.SIGTERM
    finally:
        command.kill()


@pytest.mark.parametrize("what", ["another command", "several servers"])
def test_other_handlers_stay(tmp_path, what):
    """`generate` writes what is answered, and several servers finish what runs."""
    script = tmp_path / "command.py"
    script.write_text(LOADS)
    assert subprocess.run([sys.executable, str(script), what]).returncode == 0
