"""The driver of `proxy-vllm generate --replicas`: a dataset of blocks over a pool of engines."""

import contextlib
import dataclasses
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import ray

from proxy_vllm.batch.file_job import Interrupts, Progress
from proxy_vllm.batch.ray_blocks import (
    Block,
    BlockReader,
    InputFile,
    OutputFolder,
    blocks_of,
    find_files,
)
from proxy_vllm.batch.ray_generator import BlockWriter
from proxy_vllm.batch.request import LineOptions, parse_request
from proxy_vllm.batch.settings import settings_of
from proxy_vllm.config import ProxyConfig, check_vllm_version
from proxy_vllm.engine_args import cpu_kv_cache, ranks_of
from proxy_vllm.errors import UserError, without_trace

# The most tasks into which Ray divides our list of blocks.
_MOST_TASKS = 10_000
_CONNECT_SECONDS = 5.0
# Ray speaks HTTP/2. This is how a client opens a connection: the preface, and SETTINGS that are
# empty. A server answers with its own SETTINGS.
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"


@dataclass
class RayJob:
    """Answers files and folders of prompts with several engines on Ray.

    Args:
        sources: JSONL and Parquet files, and folders of them.
        target: folder of the answers, one file a block of input rows.
        llm_arguments: of ``proxy_vllm.ProxyLLM``, for each replica.
        lines: how rows are read and answered.
        replicas: number of engines; each gets as many GPUs as its ranks are, all on one node, or
            as many CPUs where vLLM is a CPU build.
        address: of the Ray cluster; the one that Ray finds, or a local one, if None.
        block_rows: rows of a block.
        resume, overwrite, skip_errors, show_progress: as for ``FileJob``.
    """

    sources: list[str]
    target: str
    llm_arguments: dict[str, Any]
    lines: LineOptions = field(default_factory=LineOptions)
    replicas: int = 1
    address: str | None = None
    block_rows: int = 256
    resume: bool = False
    overwrite: bool = False
    skip_errors: bool = False
    show_progress: bool = True

    def run(self) -> int:
        """Answer every block that has no output yet.

        Returns:
            Exit status: 0; 1 when rows or files were skipped; 128 + n when signal n ended the job.

        Raises:
            UserError: bad input or set-up. Blocks answered before are in ``target``.
        """
        if self.replicas < 1 or self.block_rows < 1:
            raise UserError("--replicas and --block-rows must be at least 1")
        files = find_files(self.sources)
        output = OutputFolder(
            self.target,
            self._settings(),
            files,
            resume=self.resume,
            overwrite=self.overwrite,
        )
        skipped = _Skipped(self.skip_errors)
        todo = [b for b in self._blocks(files, skipped) if self.overwrite or not output.has(b)]
        with Interrupts() as interrupts:
            counts = _Counts()
            try:
                if todo:
                    if not self.skip_errors:
                        self._check_first_rows(todo)
                    _validate_trio(self.llm_arguments)
                    with _ray(self.address):
                        resources = replica_resources(self.replicas, ranks_of(self.llm_arguments))
                        output.open()
                        self._answer(todo, output, resources, skipped, counts)
            except KeyboardInterrupt:
                number = interrupts.signal or signal.SIGINT
                print(
                    f"proxy-vllm: stopped by {signal.Signals(number).name};"
                    f" blocks written: {counts.blocks} of {len(todo)}; --resume goes on",
                    file=sys.stderr,
                )
                return 128 + number
        return 1 if skipped.count else 0

    def _settings(self) -> dict[str, str]:
        """Everything that the answers and the cut into blocks depend on."""
        return settings_of(
            self.llm_arguments,
            input=[os.path.abspath(name) for name in self.sources],
            block_rows=self.block_rows,
            **dataclasses.asdict(self.lines),
        )

    def _plain_ids(self) -> bool:
        return len(self.sources) == 1 and not os.path.isdir(self.sources[0])

    def _blocks(self, files: list[InputFile], skipped: "_Skipped") -> Iterator[Block]:
        for file in files:
            try:
                yield from blocks_of(file, self.block_rows)
            except UserError as error:
                skipped.add(str(error))

    def _check_first_rows(self, todo: list[Block]) -> None:
        """Check the first row of each file: a fault there is often a fault of every row."""
        proxy, reader = _proxy_config(self.llm_arguments), BlockReader()
        for block in todo:
            if block.first == 1:
                for number, data in reader.read(block, id_prefix=None)[:1]:
                    try:
                        if isinstance(data, UserError):
                            raise data
                        parse_request(number, data, proxy, self.lines)
                    except UserError as error:
                        raise UserError(f"{block.shown}:{number}: {error}") from None

    def _answer(
        self,
        todo: list[Block],
        output: OutputFolder,
        resources: dict[str, float],
        skipped: "_Skipped",
        counts: "_Counts",
    ) -> None:
        import ray.data
        from ray.data import ActorPoolStrategy, DataContext

        if "VLLM_LOGGING_LEVEL" not in os.environ:
            logging.getLogger("ray.data").setLevel(logging.ERROR)
        context = DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        calls = self._calls()
        reports = ray.data.from_items(
            [{"block": block.to_json()} for block in todo],
            override_num_blocks=min(len(todo), _MOST_TASKS),
        ).map_batches(
            BlockWriter,
            fn_constructor_kwargs={
                "folder": str(output.path),
                "llm_arguments": {
                    **self.llm_arguments,
                    **cpu_kv_cache(self.llm_arguments, self.replicas),
                },
                "options": self.lines,
                "skip_errors": self.skip_errors,
                "plain_ids": self._plain_ids(),
            },
            batch_size=1,
            # An engine answers several blocks at a time, so that it has work while one ends.
            compute=ActorPoolStrategy(
                size=self.replicas,
                max_concurrent_calls_per_actor=calls,
                max_tasks_in_flight_per_actor=calls + 1,
                enable_true_multi_threading=True,
            ),
            runtime_env={"env_vars": _environment()},
            **resources,
        )
        rows = sum(block.rows for block in todo)
        progress = Progress(rows, self.show_progress)
        try:
            for row in reports.iter_rows():
                report = json.loads(row["report"])
                if reason := report.get("fatal") or report.get("failed"):
                    raise UserError(f"{reason} (blocks written: {counts.blocks}; --resume goes on)")
                counts.add(report)
                for reason in report.get("said", ()):
                    skipped.add(reason, progress)
                skipped.count += report["errors"] - len(report.get("said", ()))
                progress.add(report["completion_tokens"], report["prompts"], counts.note())
        except Exception as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"Ray could not go on: {_reason(error)} (blocks written: {counts.blocks};"
                " --resume goes on)"
            ) from error
        finally:
            progress.close()
        if self.show_progress:
            print(counts.table(), file=sys.stderr)

    def _calls(self) -> int:
        """How many blocks one engine answers at a time: enough rows to fill its batch twice."""
        sequences = self.llm_arguments.get("max_num_seqs") or 1024
        return max(2, min(16, -(-2 * sequences // self.block_rows)))


class _Skipped:
    """Rows that could not be answered. Each is reported and counted, or the first ends the job."""

    def __init__(self, go_on: bool) -> None:
        self._go_on = go_on
        self.count = 0

    def add(self, reason: str, progress: Progress | None = None) -> None:
        if not self._go_on:
            raise UserError(reason)
        self.count += 1
        if progress is not None:
            progress.say(f"proxy-vllm: {reason}")
        else:
            print(f"proxy-vllm: {reason}", file=sys.stderr)


class _Counts:
    """How many prompts and tokens each replica answered, and how fast since it was ready."""

    def __init__(self) -> None:
        self.blocks = 0
        self._replicas: dict[str, dict[str, float]] = {}

    def add(self, report: dict[str, Any]) -> None:
        self.blocks += 1
        counts = self._replicas.setdefault(report["replica"], {"prompts": 0, "tokens": 0})
        counts["prompts"] += report["prompts"]
        counts["tokens"] += report["completion_tokens"]
        # A replica that was restarted keeps its name, and the time of the restart counts.
        counts["since"] = min(report["since"], counts.get("since", report["since"]))

    def _rates(self) -> Iterator[tuple[str, dict[str, float], float, float]]:
        for name, counts in self._replicas.items():
            seconds = max(time.time() - counts["since"], 1e-3)
            yield name, counts, counts["prompts"] / seconds, counts["tokens"] / seconds

    def note(self) -> str:
        each = [f"{name} {p:.2g} prompts/s {t:.0f} tokens/s" for name, _, p, t in self._rates()]
        return f" ({', '.join(each)})"

    def table(self) -> str:
        return "\n".join(
            f"replica {name}: {counts['prompts']} prompts ({prompts:.2f}/s),"
            f" {counts['tokens']} output tokens ({tokens:.1f}/s)"
            for name, counts, prompts, tokens in self._rates()
        )


@contextlib.contextmanager
def _ray(address: str | None) -> Iterator[None]:
    """A connection to Ray. It is closed after the job, unless the caller had opened it."""
    if ray.is_initialized():
        yield
        return
    _check_reachable(address)
    loud = "VLLM_LOGGING_LEVEL" in os.environ
    try:
        ray.init(
            address=address,
            log_to_driver=loud,
            logging_level=logging.INFO if loud else logging.ERROR,
            **({} if address or os.environ.get("RAY_ADDRESS") else {"include_dashboard": False}),
        )
    except Exception as error:
        raise UserError(f"no connection to Ray at {address or 'local'}: {_reason(error)}") from None
    try:
        yield
    finally:
        ray.shutdown()


def _check_reachable(address: str | None) -> None:
    """Check the address first, because Ray itself tries for minutes and prints many lines."""
    address = address or os.environ.get("RAY_ADDRESS")
    if address is None or address in ("auto", "local"):
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"--ray-address {address}: auto, HOST:PORT or ray://HOST:PORT is needed")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS) as peer:
            if os.environ.get("RAY_USE_TLS", "0") != "0":
                return
            peer.sendall(_HELLO)
            answer = peer.recv(9)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"no connection to Ray at {address}: {reason}") from None
    if answer[3:4] != b"\4":
        raise UserError(f"no connection to Ray at {address}: what listens there is not Ray")


def replica_resources(replicas: int, ranks: int) -> dict[str, float]:
    """The resources that one actor asks Ray for.

    An actor lives on one node, and so do the GPUs of its ranks.

    Raises:
        UserError: the cluster has less. The message says how much is needed and how much it has.
    """
    from vllm.platforms import current_platform

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    kind = "CPU" if current_platform.is_cpu() else "GPU"
    there = [int(node.get(kind, 0)) for node in nodes]
    if sum(n // ranks for n in there) < replicas:
        each = f"{replicas} replicas of {ranks} {kind}s" if replicas > 1 else f"{ranks} {kind}s"
        on = f" on {len(nodes)} nodes, each replica on one" if len(nodes) > 1 else ""
        raise UserError(
            f"{each} need {replicas * ranks} {kind}s, and Ray has {sum(there)}{on}: use fewer"
            " --replicas or a smaller --tensor-parallel-size"
        )
    if kind == "GPU":
        return {"num_cpus": 1, "num_gpus": ranks}
    share = sum(there) // replicas
    while sum(n // share for n in there) < replicas:
        share -= 1
    return {"num_cpus": share}


def _environment() -> dict[str, str]:
    """Environment variables that every replica needs, on any node."""
    names = ("PROXY_VLLM_CPU_RUNNER", "VLLM_LOGGING_LEVEL", "HF_HUB_OFFLINE", "VLLM_NO_USAGE_STATS")
    return {name: os.environ[name] for name in names if name in os.environ}


def _proxy_config(arguments: dict[str, Any]) -> ProxyConfig:
    own = {f.name for f in dataclasses.fields(ProxyConfig)}
    given = {name: value for name, value in arguments.items() if name in own}
    if not given.get("expert"):
        given |= {"expert": "", "adapters": bool(arguments.get("enable_lora"))}
    return ProxyConfig(**given)


def _validate_trio(arguments: dict[str, Any]) -> None:
    """Check the members here, before any replica starts."""
    from proxy_vllm.plugin import register
    from proxy_vllm.validate import validate_trio

    check_vllm_version()
    register()
    validate_trio(arguments, _proxy_config(arguments))


def _reason(error: BaseException) -> str:
    """The innermost cause of an error, without Ray's traceback around it."""
    while True:
        inner = getattr(error, "cause", None) or error.__cause__
        if not isinstance(inner, BaseException):
            break
        error = inner
    lines = [line for line in str(error).splitlines() if line.strip()]
    if not lines or "Traceback" in lines[0]:
        return without_trace(error)
    return lines[0].strip()
