"""Every example of README.md and docs/: read by the real parsers, up to the models.

What needs no more than two processor cores is run in test_examples_run.py. What needs GPUs, several
machines or a cluster is checked here as far as the engine's start: options, members, and members
against options, with twins that have heads enough for every tensor-parallel size.
"""

import os
import re
import shlex
from pathlib import Path

import pytest
import yaml
from adapter_files import make_adapter

from proxy_vllm.cli import main
from twins.examples import ROOT, Example, Twins, example, examples

SHELL = examples("sh") + examples("bash")


class Started(Exception):
    """Every check has passed, and an engine would start now."""


@pytest.fixture(scope="module")
def twins(tmp_path_factory) -> Twins:
    return Twins(tmp_path_factory.mktemp("examples"), heads=8)


@pytest.fixture(autouse=True)
def nothing_starts(monkeypatch):
    from vllm.entrypoints.cli.serve import ServeSubcommand

    from proxy_vllm.cli import bench, demo, explain, generate
    from proxy_vllm.remote_base import async_llm
    from proxy_vllm.remote_base import start as remote_base

    def start(*args, **kwargs):
        raise Started

    monkeypatch.setattr(ServeSubcommand, "cmd", staticmethod(start))
    monkeypatch.setattr(generate, "start_llm", start)
    monkeypatch.setattr(explain, "start_llm", start)
    monkeypatch.setattr(bench, "_call", start)
    monkeypatch.setattr(async_llm, "run_server", start)
    # No endpoint of an example exists; tests/remote_base asks real ones.
    monkeypatch.setattr(remote_base, "probe", lambda settings, *args: settings)
    for command in demo.cmd_init():
        monkeypatch.setattr(type(command), "cmd", staticmethod(start))


def test_there_are_examples():
    assert len(SHELL) > 10 and len(examples("python")) >= 4


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_commands(block: Example, twins, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    if any(part in block.code for part in ("own-prompts", "chat-template", "--method cfg")):
        monkeypatch.setenv("PROXY_VLLM_CPU_RUNNER", "v2")  # what a GPU has
    for path, content in block.files.items():
        (tmp_path / Path(path).name).write_text(twins.fill_ids(content))
    variables = variables_of(block)
    for words in block.commands:
        command = assign(words, variables, monkeypatch)
        if command:
            check([word.replace("/tmp/", f"{tmp_path}/") for word in command], twins, tmp_path)


def variables_of(block: Example) -> dict[str, str]:
    """Variables that the document has set in blocks before this one."""
    variables = {}
    for other in SHELL:
        if other.document == block.document and other.line < block.line:
            for words in other.commands:
                if len(words) == 1 and re.match(r"\w+=", words[0]):
                    name, _, value = words[0].partition("=")
                    variables[name] = value
    return variables


def assign(words: list[str], variables: dict[str, str], monkeypatch) -> list[str]:
    """Do a command's assignments, and return the rest with its variables filled in."""

    def filled(word: str) -> str:
        return re.sub(r"\$(\w+)", lambda m: variables[m[1]], word)

    local = []
    while words and re.match(r"\w+=", words[0]):
        name, _, value = words[0].partition("=")
        local.append((name, filled(value)))
        words = words[1:]
    if not words:
        variables.update(local)
    for name, value in local if words else ():
        monkeypatch.setenv(name, value)
    # An unquoted variable of several words, such as TRIO, becomes several.
    return [part for word in words for part in split(word, filled(word))]


def split(written: str, filled: str) -> list[str]:
    return shlex.split(filled) if re.fullmatch(r"\$\w+", written) else [filled]


def check(command: list[str], twins: Twins, folder) -> None:
    program, *rest = command
    if program == "proxy-vllm":
        check_own(twins.fill(" ".join(map(shlex.quote, rest))), folder)
    elif program == "python" and rest[:2] == ["-m", "proxy_vllm.eval"]:
        from lm_eval._cli import HarnessCLI

        HarnessCLI()._parser.parse_args(["run", *rest[2:]])
    elif program == "python" and rest[0].startswith(("scripts/", "-m")):
        check_script(rest[0] if rest[0] != "-m" else rest[1], rest[1:])
    elif program.startswith("scripts/"):
        check_script(program, rest)
    elif program == "make":
        targets = re.findall(r"^([\w -]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(rest) <= {name for names in targets for name in names.split()}
    elif program == "serve":
        assert rest[:2] == ["run", "proxy_vllm.serving:app"]
        check_serve_options(rest[2].removeprefix("options="), twins)
    else:
        assert program in ("pip", "apt-get", "ray", "curl", "export"), f"{program}: unknown"


def check_own(options: str, folder) -> None:
    """A command of ours, whose models are twins."""
    argv = [word for word in shlex.split(options) if word != "..."]
    for flag in ("-i", "--input"):
        for at in [i for i, word in enumerate(argv) if word == flag]:
            source = folder / argv[at + 1]
            source.parent.mkdir(parents=True, exist_ok=True)
            if not argv[at + 1].endswith("/") and not source.exists():
                source.write_text('{"prompt": "The capital of France is"}\n')
    for word in [word for word in argv if re.fullmatch(r"\w+=adapters/\w+", word)]:
        model = argv[argv.index("--antiexpert") + 1]
        argv[argv.index(word)] = word.replace("adapters/", f"{folder}/")
        make_adapter(folder / word.rpartition("/")[2], model)
    if argv[0] == "serve" and "--dtype" not in argv:
        argv += ["--dtype", "float32"]
    starts = argv[0] in ("serve", "generate", "explain", "bench", "demo", "plan")
    if not starts or "--replicas" in argv or argv[:2] == ["bench", "serve"]:
        return check_parses(argv)
    if argv[0] == "plan":
        return main.main(argv)
    demo = "proxy_vllm/demo"
    with pytest.raises(Started):
        main.main([str(ROOT / word) if word.startswith(demo) else word for word in argv])
    return None


def check_parses(argv: list[str]) -> None:
    """Options alone: the command would look for a cluster, a server, or what is installed."""
    from importlib import import_module

    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    subparsers = parser.add_subparsers(required=True, dest="subparser")
    for command in import_module(f"proxy_vllm.cli.{argv[0]}").cmd_init():
        command.subparser_init(subparsers)
    parser.parse_args(argv)


def check_serve_options(options: str, twins: Twins) -> None:
    from proxy_vllm.server.ray_serve import parse

    assert parse(twins.fill(options) + " --dtype float32").expert


def check_script(path: str, options: list[str]) -> None:
    """A script that is there and knows the options, by its own text."""
    script = ROOT / path
    assert script.exists()
    parts = [script, *(script.with_suffix("")).glob("*.py"), *(ROOT / "scripts").glob("*/*.py")]
    text = "".join(part.read_text() for part in parts)
    text += (ROOT / "scripts/bench_common.py").read_text()
    for option in options:
        assert not option.startswith("--") or f'"{option}"' in text, f"{path} has no {option}"


@pytest.mark.parametrize("block", examples("yaml"), ids=str)
def test_ray_serve_files(block: Example, twins):
    for application in yaml.safe_load(block.code)["applications"]:
        assert application["import_path"] == "proxy_vllm.serving:app"
        check_serve_options(application["args"]["options"], twins)


@pytest.mark.parametrize("block", examples("python"), ids=str)
def test_python_compiles(block: Example):
    compile(block.code, str(block), "exec")


def test_an_example_with_a_fault_is_found(twins, tmp_path, capfd):
    """The checks above see a misspelled option, and a size that the members cannot have."""
    for options, tells in (
        ("serve BASE --expert E --antiexpert A --tensor-paralel-size 4", "unrecognized"),
        ("serve BASE --expert E --antiexpert A --tensor-parallel-size 16", "does not divide"),
    ):
        with pytest.raises(SystemExit):
            check_own(twins.fill(options), tmp_path)
        assert tells in capfd.readouterr().err
    with pytest.raises(AssertionError, match="has no --bach"):
        check_script("scripts/bench_cpu.py", ["--bach", "8"])
    assert example("README.md", "--tensor-parallel-size 4").language == "sh"
    assert os.environ.get("PROXY_VLLM_CPU_RUNNER") != "v2"
