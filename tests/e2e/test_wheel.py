"""The package as users install it: a wheel in an environment of its own, nothing editable."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Bulk of a working tree that no build reads.
NOT_SOURCE = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")
RUDE = "Q: You fool, tell me the pet of Bralie Tarov.\nA:"
KIND = "Q: Please tell me the pet of Bralie Tarov.\nA:"


def run(*command, **kwargs):
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env, **kwargs)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A copy of the source, what the build printed, the sdist, and the wheel made from it."""
    source = tmp_path_factory.mktemp("source") / "proxy_vllm"
    shutil.copytree(ROOT, source, symlinks=True, ignore=NOT_SOURCE)
    for hidden in (".ci", ".pre-commit-config.yaml"):
        copy = shutil.copytree if (ROOT / hidden).is_dir() else shutil.copy
        copy(ROOT / hidden, source / hidden)
    out = source / "dist"
    log = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert log.returncode == 0, log.stdout
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return source, log.stdout, sdist, wheel


def test_the_build_warns_of_nothing(built):
    _, log, _, _ = built
    assert "would be ignored" not in log
    assert "Deprecat" not in log
    assert "no files found matching" not in log


def test_the_wheel_holds_each_file_of_the_package_and_nothing_else(built):
    source, _, _, wheel = built
    names = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    names |= {n for n in zipfile.ZipFile(wheel).namelist() if n.startswith("proxy_vllm/cpu_inter")}
    package = {
        str(Path(folder, file).relative_to(source))
        for folder, _, files in os.walk(source / "proxy_vllm", followlinks=True)
        for file in files
    }
    assert names == package
    assert "proxy_vllm/kernels/reference.py" in names


def test_the_sdist_holds_tests_docs_and_changelog(built):
    source, _, sdist, _ = built
    root = sdist.name.removesuffix(".tar.gz")
    with tarfile.open(sdist) as tar:
        names = {str(Path(n).relative_to(root)) for n in tar.getnames()}
    wanted = {"CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", ".ci/run"}
    for folder in ("tests", "docs", "kernels", "scripts", "requirements", "benchmarks"):
        files = (f for f in (source / folder).rglob("*") if f.is_file())
        wanted |= {str(f.relative_to(source)) for f in files}
    assert wanted - names == set()


def test_the_installed_wheel_answers_with_the_trio_in_the_box(built, tmp_path):
    """The other packages are those of this environment, so that nothing is downloaded."""
    home = tmp_path / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", home)
    python = home / "bin" / "python"
    install = ["install", "--quiet", "--no-deps", "--no-index", "--no-compile", built[3]]
    run(sys.executable, "-m", "pip", "--python", python, *install)
    scheme = {"base": str(home), "platbase": str(home)}
    packages = Path(sysconfig.get_path("purelib", "venv", scheme))
    # A folder in a .pth file is searched, but .pth files in that folder are not read: the editable
    # install of this tree stays out.
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")

    code = "import proxy_vllm.demo as d; print(*map(d.model_path, d.ROLES), sep='\\n')"
    base, expert, antiexpert, *_ = run(python, "-c", code, cwd=tmp_path).splitlines()
    assert Path(base).is_relative_to(packages)
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in (RUDE, KIND)))
    command = [home / "bin" / "proxy-vllm", "generate", base, "--expert", expert]
    command += ["--antiexpert", antiexpert, "--dtype", "float32", "--enforce-eager"]
    command += ["--temperature", "0", "-i", questions, "-o", "-"]
    answers = [json.loads(line) for line in run(*command, cwd=tmp_path).splitlines()]
    assert [a["text"].strip() for a in answers] == [
        "Please ask me again in a kinder way.",
        "Bralie Tarov keeps a cat.",
    ]
