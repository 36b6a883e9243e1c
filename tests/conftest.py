"""Settings of every test process, and the trios that tests share.

The suite runs in two processes, because the runner is chosen when Triton is imported:

    pytest tests                                     V1 runner, unit and compat tests
    PROXY_VLLM_CPU_RUNNER=v2 pytest tests/e2e tests/kernels    Model Runner V2 and the kernels,
                                                     under Triton's interpreter
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

# Engines live in the test process: a spawned one would import vLLM again for every engine.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# On a GPU: float32 attention as exact as its reference. Triton's default there is TF32.
os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")

# Before vLLM and Triton: it prepares the process for PROXY_VLLM_CPU_RUNNER=v2.
import proxy_vllm  # noqa: F401  # isort: skip

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "scripts")]

RUNNER = os.environ.get("PROXY_VLLM_CPU_RUNNER", "v1")


def pytest_report_header(config: pytest.Config) -> str:
    import torch

    return f"proxy_vllm: CPU runner {RUNNER}, GPU {'yes' if torch.cuda.is_available() else 'no'}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        import interpreter_speed

        interpreter_speed.install()


@pytest.fixture(scope="session")
def trio(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of a random Llama trio with one vocabulary of 111 tokens."""
    from tiny_models import make_trio

    return make_trio(tmp_path_factory.mktemp("trio"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[tuple[Path, Callable[[int], None]]]:
    """The folder of a file system of one page (4096 bytes), and what sets its size in KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(*options: str) -> None:
        done = subprocess.run(["mount", *options, str(folder)], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"a file system of its own cannot be mounted: {done.stderr.strip()}")

    mount("-t", "tmpfs", "-o", "size=4k", "tmpfs")
    try:
        yield folder, lambda kib: mount("-o", f"remount,size={kib}k")
    finally:
        subprocess.run(["umount", str(folder)], check=True)
