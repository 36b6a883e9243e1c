"""One JSONL file answered by one engine: resuming, bad lines, signals, progress."""

import contextlib
import itertools
import os
import signal
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from proxy_vllm.batch.generator import BatchGenerator, Item, Result, engine_is_dead
from proxy_vllm.batch.jsonl import ResultFile, count_lines, only_new, open_input, read_jsonl
from proxy_vllm.batch.request import LineOptions, parse_request
from proxy_vllm.batch.settings import SettingsFile
from proxy_vllm.config import ProxyConfig
from proxy_vllm.errors import UserError

if TYPE_CHECKING:
    from proxy_vllm.llm import ProxyLLM


class Interrupts:
    """SIGINT and SIGTERM raise ``KeyboardInterrupt``, but never inside ``held()``."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._holding = False
        self._old: dict[int, Any] = {}

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._old[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame: object) -> None:
        self.signal = number
        if not self._holding:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        self._holding = True
        try:
            yield
        finally:
            self._holding = False
        if self.signal is not None:
            raise KeyboardInterrupt


class Progress:
    """A bar with prompts done and output tokens a second; nothing where no one watches."""

    def __init__(self, total: int | None, shown: bool, desc: str = "Prompts") -> None:
        from tqdm import tqdm

        self._bar = tqdm(
            total=total,
            desc=desc,
            unit="prompt",
            dynamic_ncols=True,
            disable=not (shown and sys.stderr.isatty()),
        )
        self._tokens = 0

    def add(self, tokens: int, prompts: int = 1, note: str = "") -> None:
        self._tokens += tokens
        if not self._bar.disable:
            rate = self._tokens / max(self._bar.format_dict["elapsed"], 1e-9)
            self._bar.set_postfix_str(f"{rate:.1f} output tokens/s{note}", refresh=False)
            self._bar.update(prompts)

    def say(self, text: str) -> None:
        self._bar.write(text, file=sys.stderr)

    def close(self) -> None:
        self._bar.close()


@dataclass
class FileJob:
    """What `proxy-vllm generate` does with one file.

    Args:
        source: JSONL file, or ``-`` for standard input.
        target: JSONL file, or ``-`` for standard output.
        lines: how lines are read and answered.
        proxy: of the engine to come; with it the first line is checked before that starts.
        settings: what the answers depend on (``settings.settings_of``), kept beside ``target``.
        resume: keep the answers that ``target`` holds, and add those that are missing; only where
            they were made with the same settings.
        overwrite: replace what ``target`` holds.
        skip_errors: leave lines out that cannot be answered, and name them with their reason in
            ``TARGET.errors.jsonl``; otherwise the first of them ends the job.
        show_progress: draw a bar if standard error is a terminal.
    """

    source: str
    target: str
    lines: LineOptions = field(default_factory=LineOptions)
    proxy: ProxyConfig | None = None
    settings: dict[str, str] = field(default_factory=dict)
    resume: bool = False
    overwrite: bool = False
    skip_errors: bool = False
    show_progress: bool = True

    def run(self, make_llm: "Callable[[], ProxyLLM]") -> int:
        """Answer every line that has no answer yet.

        Args:
            make_llm: starts the engine; called once it is known that there is something to do.

        Returns:
            Exit status: 0; 1 when lines were skipped; 128 + n when signal n ended the job.

        Raises:
            UserError: a line could not be answered and ``skip_errors`` is False, a file cannot be
                read or written, or the engine died. What was answered before is in ``target``.
        """
        self._refuse_same_file()
        with open_input(self.source) as stream, Interrupts() as interrupts:
            results = ResultFile(self.target, resume=self.resume, overwrite=self.overwrite)
            if results.done:
                SettingsFile(self.target, self.settings).check()
            try:
                return self._run(stream, results, make_llm, interrupts)
            except KeyboardInterrupt:
                number = interrupts.signal or signal.SIGINT
                print(
                    f"proxy-vllm: stopped by {signal.Signals(number).name};"
                    f" answers written: {results.written}; --resume goes on",
                    file=sys.stderr,
                )
                return 128 + number
            finally:
                results.close()

    @property
    def shown(self) -> str:
        return "standard input" if self.source == "-" else self.source

    def _run(
        self,
        stream: BinaryIO,
        results: ResultFile,
        make_llm: "Callable[[], ProxyLLM]",
        interrupts: Interrupts,
    ) -> int:
        items = only_new(self._lines(stream), results.done)
        bad_lines = _BadLines(self)
        first, items = self._up_to_a_good_line(items)
        if not first or isinstance(first[-1][1], UserError):  # there is nothing to answer
            if not self.resume:
                results.open()
            with contextlib.closing(bad_lines):
                for number, error in first:
                    bad_lines.add(Result(number, None, error=str(error)))
                return bad_lines.status()
        items = itertools.chain(first, items)
        is_file = stat.S_ISREG(os.fstat(stream.fileno()).st_mode)
        total = count_lines(Path(self.source)) if is_file and self.source != "-" else None
        if self.target == "-":
            results.open()  # before the engine's start prints anything
        llm = make_llm()
        if self.target != "-":
            results.open()  # after: a model that does not load costs no earlier answers
            if results.is_regular and not results.done:
                SettingsFile(self.target, self.settings).write()
        progress = Progress(total, self.show_progress)
        try:
            generator = BatchGenerator(
                llm,
                self.lines,
                stop_on_error=not self.skip_errors,
            )
            for result in generator.run(items, background=not is_file):
                with interrupts.held():
                    if result.output is not None:
                        results.write(result.output)
                    else:
                        bad_lines.add(result, progress)
                    progress.add(result.completion_tokens)
        except Exception as error:
            if not engine_is_dead(error):
                raise
            if interrupts.signal is not None:  # the signal reached the engine's process first
                raise KeyboardInterrupt from None
            raise UserError(
                f"the engine died, for the reason above; answers written: {results.written};"
                " --resume goes on"
            ) from None
        finally:
            progress.close()
            bad_lines.close()
            with contextlib.suppress(Exception):
                llm.llm_engine.engine_core.shutdown()
        return bad_lines.status()

    def _lines(self, stream: BinaryIO) -> Iterator[Item]:
        try:
            yield from read_jsonl(stream)
        except OSError as error:
            raise UserError(f"{self.shown}: cannot read on ({error.strerror or error})") from None
        except UserError as error:
            raise UserError(f"{self.shown}: {error}") from None

    def _up_to_a_good_line(self, items: Iterator[Item]) -> tuple[list[Item], Iterator[Item]]:
        """Lines up to the first that can be read, and the rest: what is wrong with a whole file
        shall be said before an engine starts.
        """
        first: list[Item] = []
        for number, data in items:
            try:
                if isinstance(data, UserError):
                    raise data
                if self.proxy is not None:
                    parse_request(number, data, self.proxy, self.lines)
                first.append((number, data))
                break
            except UserError as error:
                if not self.skip_errors:
                    raise UserError(f"{self.shown}:{number}: {error}") from None
                first.append((number, error))
        return first, items

    def _refuse_same_file(self) -> None:
        if "-" not in (self.source, self.target):
            with contextlib.suppress(FileNotFoundError):
                if os.path.samefile(self.source, self.target):
                    raise UserError(f"{self.target} is the input: name another output")


def print_error(text: str) -> None:
    print(text, file=sys.stderr)


class _BadLines:
    """Lines that could not be answered: all of them reported, or the first one kept to raise."""

    def __init__(self, job: FileJob) -> None:
        self._job = job
        self._count = 0
        self._first: UserError | None = None
        self._file: ResultFile | None = None
        if job.target != "-":
            # Lines without an answer are read again by --resume, and bad ones reported again.
            name = f"{job.target}.errors.jsonl"
            Path(name).unlink(missing_ok=True)
            self._file = ResultFile(name)

    def add(self, result: Result, progress: Progress | None = None) -> None:
        self._count += 1
        message = f"{self._job.shown}:{result.number}: {result.error}"
        if not self._job.skip_errors:
            self._first = self._first or UserError(message)
            return
        say = print_error if progress is None else progress.say
        say(f"proxy-vllm: {message}")
        if self._file is not None:
            if self._count == 1:
                self._file.open()
            self._file.write(result.refusal())

    def status(self) -> int:
        if self._first is not None:
            raise self._first
        return 1 if self._count else 0

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
