"""Kernel tests: on the GPU where there is one, else in Triton's interpreter on the CPU."""

import os
from types import SimpleNamespace

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.backends

    # vLLM's CPU build enables Triton when a backend named "cpu" says that it is active; the
    # interpreter needs nothing of it. Must precede the first import of vLLM.
    triton.backends.backends.setdefault(
        "cpu", SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True), compiler=None)
    )


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
