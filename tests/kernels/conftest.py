"""Kernel tests: on the GPU where there is one, else in Triton's interpreter on the CPU.

`pytest tests/kernels` alone chooses the interpreter by itself; with other folders in the same
process PROXY_VLLM_CPU_RUNNER=v2 must choose it, since it then holds for all of them.
"""

import os
import sys
from pathlib import Path

import pytest
import torch

from proxy_vllm.envs import CPU_RUNNER, cpu_runner, prepare_process

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))


def pytest_configure(config: pytest.Config) -> None:
    if torch.cuda.is_available() or cpu_runner() == "v2":
        return
    paths = [Path(arg.split("::")[0]).resolve() for arg in config.args]
    if paths and all(path == HERE or HERE in path.parents for path in paths):
        os.environ[CPU_RUNNER] = "v2"
        prepare_process()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available() or cpu_runner() == "v2":
        return
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(
                pytest.mark.skip(reason=f"kernels on a CPU need {CPU_RUNNER}=v2 (interpreter)")
            )


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def poisoned_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scratch memory starts as NaN (integers: a huge value), so that unwritten results show."""
    plain = torch.Tensor.new_empty

    def new_empty(self, *args, **kwargs):
        tensor = plain(self, *args, **kwargs)
        if tensor.is_floating_point():
            return tensor.fill_(float("nan"))
        return tensor.fill_(torch.iinfo(tensor.dtype).max // 2)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
