"""JSONL files of a batch: lines that may be bad, and a results file that survives a kill."""

import json
import os
import stat
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from proxy_vllm.batch.generator import Item
from proxy_vllm.batch.request import id_of
from proxy_vllm.errors import UserError

# Longer than any prompt; a binary file without line ends must not fill the memory.
MAX_LINE_BYTES = 256 << 20
# The mark that Windows puts first.
_MARK = b"\xef\xbb\xbf"


def parse_line(line: bytes) -> dict[str, Any]:
    """The JSON object on one line; ``UserError`` tells what else it is."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 (byte {error.start + 1})") from None
    try:
        data = json.loads(text, parse_constant=_no_constant)
    except UserError:
        raise
    except json.JSONDecodeError as error:
        raise UserError(f"not JSON ({error.msg}, column {error.colno})") from None
    except ValueError as error:  # an integer of thousands of digits
        raise UserError(f"not usable JSON ({error})") from None
    except RecursionError:
        raise UserError("not usable JSON (nested too deeply)") from None
    if not isinstance(data, dict):
        raise UserError(f"a JSON object is needed, this is {_kind(data)}")
    if "\\ud" in text.lower():
        try:
            json.dumps(data, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise UserError("half of a surrogate pair stands in a string") from None
    return data


def _no_constant(name: str) -> None:
    raise UserError(f"not JSON ({name} is no number there)")


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    return {list: "a list", str: "a string", bool: "true or false"}.get(type(value), "a number")


def refuse_array(start: bytes) -> None:
    """Raise ``UserError`` if a file starts as one JSON array, and not as lines of JSON."""
    if start.removeprefix(_MARK).lstrip()[:1] == b"[":
        raise UserError(
            "a JSON array, and not one JSON object a line: `jq -c '.[]' FILE` makes lines of it"
        )


def read_jsonl(stream: BinaryIO) -> Iterator[Item]:
    """Number the lines of ``stream`` from 1 and parse them; blank ones count and are left out.

    Raises:
        UserError: the whole file is a JSON array.
    """
    number, begun = 0, False
    while line := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        if number == 1:
            line = line.removeprefix(_MARK)
        if not begun and line.strip():
            begun = True
            refuse_array(line)
        if len(line) > MAX_LINE_BYTES:
            while line and not line.endswith(b"\n"):
                line = stream.readline(1 << 20)
            yield number, UserError(f"longer than {MAX_LINE_BYTES >> 20} MiB")
        elif line.strip():
            try:
                yield number, parse_line(line)
            except UserError as error:
                yield number, error


def only_new(items: Iterable[Item], done: set[str | int]) -> Iterator[Item]:
    """Leave out lines whose id is in ``done``; a second line with one id becomes a bad line."""
    seen: set[str | int] = set()
    for number, data in items:
        if isinstance(data, dict):
            try:
                request_id = id_of(number, data)
                if request_id in seen:
                    raise UserError(f"id {request_id!r} stands on an earlier line too")
                seen.add(request_id)
                if request_id in done:
                    continue
            except UserError as error:
                yield number, error
                continue
        yield number, data


def count_lines(path: Path, limit: int = 4 << 30) -> int | None:
    """Lines of a file, for a progress bar; None where counting would take long."""
    if path.stat().st_size > limit:
        return None
    count, last = 0, b"\n"
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            count += chunk.count(b"\n")
            last = chunk[-1:]
    return count + (last != b"\n")


class ResultFile:
    """A JSONL file that grows by whole lines only, each handed to the system as it is written.

    Creating the object changes nothing: it says at once what could not be done later, before an
    engine starts. ``open`` begins to write.

    Args:
        name: path, or ``-`` for standard output.
        resume: keep the whole lines that are there; their ids are in ``done``.
        overwrite: replace what is there.

    Raises:
        UserError: the file cannot be written, or holds something and neither flag was given.
    """

    def __init__(self, name: str, *, resume: bool = False, overwrite: bool = False) -> None:
        self.name = name
        self.done: set[str | int] = set()
        self.written = 0
        self._end = 0
        self._fd = -1
        self.is_regular = False
        if name == "-":
            if resume:
                raise UserError("--resume needs an output file, not standard output")
            return
        path = Path(name)
        try:
            info = path.stat()
        except FileNotFoundError:
            self.is_regular = True
            if not path.absolute().parent.is_dir():
                raise UserError(f"{name}: there is no folder {path.parent} to write to") from None
            if not os.access(path.absolute().parent, os.W_OK):
                raise UserError(f"{name}: its folder cannot be written to") from None
            return
        except OSError as error:
            raise _cannot("write", name, error) from None
        if stat.S_ISDIR(info.st_mode):
            raise UserError(f"{name} is a folder: name a file")
        if not os.access(path, os.W_OK):
            raise UserError(f"{name}: cannot be written to (Permission denied)")
        self.is_regular = stat.S_ISREG(info.st_mode)
        if not self.is_regular or info.st_size == 0 or overwrite:
            return
        if not resume:
            raise UserError(
                f"{name} holds results: --resume adds those that are missing, --overwrite replaces"
                " them"
            )
        self._read_done(path)

    def _read_done(self, path: Path) -> None:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    return  # half a line, left by a kill; `open` cuts it off
                try:
                    data = parse_line(line)
                    if data.get("id") is None:
                        raise UserError("it has no id")
                    self.done.add(id_of(number, data))
                except UserError as error:
                    raise UserError(
                        f"{self.name}:{number} is no result of this command ({error}): --resume"
                        " cannot go on from it; --overwrite replaces the file"
                    ) from None
                self._end += len(line)

    def open(self) -> None:
        """Open the file for writing, without what is to be cut off or replaced."""
        if self.name == "-":
            # Whatever else prints in this process, and in those it starts, goes to standard error.
            sys.stdout.flush()
            self._fd = os.dup(1)
            os.dup2(2, 1)
            return
        try:
            self._fd = os.open(self.name, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
            if self.is_regular:
                os.ftruncate(self._fd, self._end)
                os.lseek(self._fd, self._end, os.SEEK_SET)
        except OSError as error:
            raise _cannot("write", self.name, error) from None

    def write(self, data: dict[str, Any]) -> None:
        """Append one line, or nothing of it.

        Raises:
            UserError: the line could not be written, for example on a full disk.
        """
        line = memoryview(json.dumps(data, ensure_ascii=False).encode() + b"\n")
        left = line
        try:
            while left:
                left = left[os.write(self._fd, left) :]
        except OSError as error:
            if self.is_regular:
                os.ftruncate(self._fd, self._end)
            raise _cannot("write", self.name, error) from None
        self._end += len(line)
        self.written += 1

    def close(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            try:
                os.close(fd)
            except OSError as error:  # network file systems report a full disk here
                raise _cannot("write", self.name, error) from None


def _cannot(what: str, name: str, error: OSError) -> UserError:
    shown = "standard output" if name == "-" else name
    return UserError(f"{shown}: cannot {what} ({error.strerror or error})")


def open_input(name: str) -> BinaryIO:
    """Open a JSONL file, or standard input for ``-``; ``UserError`` if it cannot be read."""
    if name == "-":
        # Not sys.stdin: a thread that hangs in its lock would stop the interpreter's exit.
        return open(0, "rb", closefd=False)
    try:
        return open(name, "rb")
    except IsADirectoryError:
        raise UserError(f"{name} is a folder: --replicas reads folders, on Ray") from None
    except OSError as error:
        raise _cannot("read", name, error) from None
