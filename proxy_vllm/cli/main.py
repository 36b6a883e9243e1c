"""Entry point of the `proxy-vllm` command."""

import argparse
import os
import select
import sys
from importlib import import_module

import proxy_vllm
from proxy_vllm.errors import UserError, one_line

# One module a subcommand. Only the one that runs is imported: vLLM's options take seconds to load.
SUBCOMMANDS = {
    "serve": "serve a proxy-tuned model over HTTP, with every option of `vllm serve`",
    "generate": "answer a JSONL file of prompts",
    "explain": "show on a page what steering did to each token",
    "eval": "evaluate on tasks of the lm-evaluation-harness, or score finished answers",
    "bench": "vLLM's own benchmarks, with the trio filled in",
    "plan": "tell memory, speed and slowdown of a trio before any download",
    "doctor": "check this installation on this machine",
    "demo": "run the embedded trio against its three baselines",
}

# What a shell shows of a command whose reader has closed the pipe: 128 + SIGPIPE.
_CLOSED_PIPE = 141


def _usage() -> str:
    width = max(map(len, SUBCOMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in SUBCOMMANDS.items()]
    return "\n".join(
        [
            "usage: proxy-vllm COMMAND ...",
            "",
            "Steer a large model with two small ones: base + alpha * (expert - antiexpert).",
            "",
            *lines,
            "",
            "`proxy-vllm COMMAND --help` tells the options of a command.",
        ]
    )


def main(argv: list[str] | None = None) -> None:
    """Run one subcommand; a fault that the user can mend is one line and exit status 2."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        sys.exit(0 if argv else 2)
    if argv[0] in ("-v", "--version"):
        print(proxy_vllm.__version__)
        return
    if argv[0] not in SUBCOMMANDS:
        _fail(f"no command {argv[0]!r}; there are {', '.join(SUBCOMMANDS)}")
    try:
        _run(argv)
        sys.stdout.flush()
    except UserError as error:
        _fail(str(error))
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            sys.exit(_CLOSED_PIPE)
        reason = _refusal(error)
        if reason is None or os.environ.get("VLLM_LOGGING_LEVEL", "").upper() == "DEBUG":
            raise
        _fail(f"{reason} (VLLM_LOGGING_LEVEL=DEBUG shows where)")


def _run(argv: list[str]) -> None:
    if argv[0] == "plan":  # arithmetic on configuration files: runs where vLLM is not installed
        _dispatch(argv, argparse.ArgumentParser(prog="proxy-vllm"))
        return
    from proxy_vllm.config import check_vllm_version

    check_vllm_version()
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    _dispatch(argv, FlexibleArgumentParser(prog="proxy-vllm"))


def _dispatch(argv: list[str], parser: argparse.ArgumentParser) -> None:
    subparsers = parser.add_subparsers(required=True, dest="subparser")
    commands = {c.name: c for c in import_module(f"proxy_vllm.cli.{argv[0]}").cmd_init()}
    for command in commands.values():
        command.subparser_init(subparsers).set_defaults(dispatch_function=command.cmd)
    args = parser.parse_args(argv)
    commands[args.subparser].validate(args)
    args.dispatch_function(args)


def _refusal(error: Exception) -> str | None:
    """One line, if vLLM raised this to say that an option, a file or an input cannot be used."""
    exceptions = sys.modules.get("vllm.exceptions")
    client_errors = (exceptions.VLLMClientError,) if exceptions is not None else ()
    if isinstance(error, (ValueError, OSError, *client_errors)):
        return one_line(error)
    # Another process has logged the cause, with its own traceback.
    if isinstance(error, RuntimeError) and str(error).startswith("Engine core init"):
        return "the engine did not start: its last messages above name the cause"
    return None


def _reader_is_gone() -> bool:
    """Whether nobody reads standard output any more, as after `| head`; then write nowhere."""
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)
    if not any(event & select.POLLERR for _, event in output.poll(0)):
        return False
    # Python would write what is left when it ends, and complain of that too.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def _fail(message: str) -> None:
    print(f"proxy-vllm: error: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
