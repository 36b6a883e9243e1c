"""The processes that benchmarks give their engines."""

import atexit
import multiprocessing
import os
import time

import pytest
from bench_common import ChildProcess

HELD: dict[str, int] = {}


def hold(value: int) -> int:
    HELD["value"] = value
    return os.getpid()


def held() -> int:
    return HELD["value"]


def fail() -> None:
    print("said before the end")
    raise ValueError("no such thing")


def leave_an_engine() -> None:
    """Start a process that only an orderly exit ends, as vLLM's engine core is."""
    engine = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(300,))
    engine.start()
    atexit.register(engine.terminate)


def test_calls_share_one_process_of_their_own():
    with ChildProcess() as child:
        assert child(hold, 7) != os.getpid()
        assert child(held) == 7
    assert not HELD


def test_a_failed_call_ends_the_benchmark_and_shows_what_was_printed():
    with pytest.raises(SystemExit) as failed, ChildProcess() as child:
        child(fail)
    message = str(failed.value)
    assert "error: fail failed: no such thing\n" in message
    assert "said before the end" in message


@pytest.mark.timeout(60)
def test_an_engine_that_is_left_ends_with_its_process():
    with ChildProcess() as child:
        child(leave_an_engine)
