"""Blocks of a batch on Ray: rows of one input file, answered together into one output file.

A block is named by its input file and its rows, and its output file appears by a rename when it is
whole. So doing a block twice, after a kill, writes the same file again, and a later run sees from
the names alone what is left to do.
"""

import dataclasses
import hashlib
import json
import os
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proxy_vllm.batch.generator import Item
from proxy_vllm.batch.jsonl import only_new, parse_line, refuse_array
from proxy_vllm.batch.request import is_openai
from proxy_vllm.batch.settings import check_same, write_whole
from proxy_vllm.errors import UserError

_PARQUET = ".parquet"
# What is read in a folder. A file that is named itself is JSONL unless it ends in .parquet.
_KNOWN = (".jsonl", ".ndjson", _PARQUET)
MANIFEST = "_manifest.json"
ERRORS = "_errors"


@dataclass(frozen=True)
class InputFile:
    """A file to answer: its path, and how people shall see it (as it was given)."""

    path: str
    shown: str

    @property
    def is_parquet(self) -> bool:
        return self.path.endswith(_PARQUET)

    def fingerprint(self) -> list[int]:
        info = os.stat(self.path)
        return [info.st_size, info.st_mtime_ns]


def find_files(names: Iterable[str]) -> list[InputFile]:
    """The JSONL and Parquet files among and below ``names``, folders in alphabetical order.

    Raises:
        UserError: a name that does not exist, or names that hold no such file.
    """
    found = []
    for name in names:
        path = os.path.abspath(name)
        if not os.path.lexists(path):
            raise UserError(f"{name}: no such file or folder")
        if not os.path.isdir(path):
            found.append(InputFile(path, name))
            continue
        for folder, folders, files in os.walk(path, onerror=_unreadable):
            folders[:] = sorted(f for f in folders if not f.startswith((".", "_")))
            for file in sorted(files):
                if file.endswith(_KNOWN) and not file.startswith((".", "_")):
                    full = os.path.join(folder, file)
                    shown = os.path.join(name, os.path.relpath(full, path))
                    found.append(InputFile(full, shown))
    if not found:
        raise UserError(f"{', '.join(names)}: no file that ends in {', '.join(_KNOWN)}")
    return found


def _unreadable(error: OSError) -> None:
    raise UserError(f"{error.filename}: cannot read ({error.strerror})") from None


@dataclass(frozen=True)
class Block:
    """Rows ``first`` to ``first + rows - 1`` (from 1) of one file.

    ``offset`` and ``size`` are bytes of a JSONL file; of a Parquet file, the number of the row
    group, and the rows of that group that come before.
    """

    path: str
    shown: str
    first: int
    rows: int
    offset: int
    size: int

    @property
    def name(self) -> str:
        """Of the output file: unique to the input file and the rows, sorting in their order."""
        key = hashlib.blake2b(self.path.encode(), digest_size=4).hexdigest()
        stem = Path(self.path).stem.encode()[:80].decode(errors="ignore")
        return f"{stem}-{key}-{self.first:012d}-{self.first + self.rows - 1:012d}.jsonl"

    def to_json(self) -> str:
        return json.dumps(dataclasses.astuple(self))

    @classmethod
    def from_json(cls, text: str) -> "Block":
        return cls(*json.loads(text))


def blocks_of(file: InputFile, rows: int) -> Iterator[Block]:
    """Cut a file into blocks of at most ``rows`` rows, reading it once in bounded memory.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        yield from (_parquet_blocks if file.is_parquet else _jsonl_blocks)(file, rows)
    except OSError as error:
        raise UserError(f"{file.shown}: cannot read ({error.strerror or error})") from None


def _jsonl_blocks(file: InputFile, rows: int) -> Iterator[Block]:
    first, start, count, position = 1, 0, 0, 0
    with open(file.path, "rb") as stream:
        try:
            refuse_array(stream.read(1 << 10))
        except UserError as error:
            raise UserError(f"{file.shown}: {error}") from None
        stream.seek(0)
        while chunk := stream.read(1 << 20):
            at = 0
            while (end := chunk.find(b"\n", at)) >= 0:
                at = end + 1
                count += 1
                if count == rows:
                    stop = position + at
                    yield Block(file.path, file.shown, first, rows, start, stop - start)
                    first, start, count = first + rows, stop, 0
            position += len(chunk)
    if position > start:  # the last line may lack its end
        with open(file.path, "rb") as stream:
            stream.seek(position - 1)
            count += stream.read(1) != b"\n"
        yield Block(file.path, file.shown, first, count, start, position - start)


def _parquet_blocks(file: InputFile, rows: int) -> Iterator[Block]:
    metadata = _parquet(file.path, file.shown).metadata
    first = 1
    for group in range(metadata.num_row_groups):
        total = metadata.row_group(group).num_rows
        for before in range(0, total, rows):
            part = min(rows, total - before)
            yield Block(file.path, file.shown, first, part, group, before)
            first += part


def _parquet(path: str, shown: str) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(f"{shown}: cannot read ({' '.join(str(reason).split())})") from None


class BlockReader:
    """Reads the rows of blocks; keeps the last Parquet row group, which the next block shares.

    The threads of a replica share one reader.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._group: tuple[str, int] | None = None
        self._table: Any = None

    def read(self, block: Block, *, id_prefix: str | None) -> list[Item]:
        """Numbered rows, a bad one as a ``UserError``.

        Args:
            block: what to read.
            id_prefix: a row without ``id`` gets ``{id_prefix}:{number}``, or its bare number.

        Raises:
            UserError: the file cannot be read.
        """
        parquet = block.path.endswith(_PARQUET)
        rows = self._parquet_rows(block) if parquet else list(_jsonl_rows(block))
        if id_prefix is not None:
            for number, data in rows:
                if isinstance(data, dict) and not is_openai(data) and data.get("id") is None:
                    data["id"] = f"{id_prefix}:{number}"
        return list(only_new(rows, set()))

    def _parquet_rows(self, block: Block) -> list[Item]:
        with self._lock:
            table = self._row_group(block)
        rows = table.slice(block.size, block.rows).to_pylist()
        return list(enumerate(rows, start=block.first))

    def _row_group(self, block: Block) -> Any:
        import pyarrow

        key = (block.path, block.offset)
        if self._group != key:
            self._group = self._table = None
            file = _parquet(block.path, block.shown)
            try:
                self._table = file.read_row_group(block.offset)
            except (pyarrow.ArrowException, OSError) as error:
                reason = " ".join(str(error).split())
                raise UserError(f"{block.shown}: cannot read ({reason})") from None
            self._group = key
        return self._table


def _jsonl_rows(block: Block) -> Iterator[Item]:
    try:
        with open(block.path, "rb") as stream:
            stream.seek(block.offset)
            data = stream.read(block.size)
    except OSError as error:
        raise UserError(f"{block.shown}: cannot read ({error.strerror or error})") from None
    if block.first == 1:
        data = data.removeprefix(b"\xef\xbb\xbf")
    for number, line in enumerate(data.split(b"\n"), start=block.first):
        if line.strip():
            try:
                yield number, parse_line(line)
            except UserError as error:
                yield number, error


class OutputFolder:
    """A folder of block files, their errors, and a record of what they were made from.

    Args:
        name: the folder; made if it is not there.
        settings: what the answers depend on. A folder begun with others is not gone on with.
        files: the input.
        resume: keep the blocks that are there.
        overwrite: remove the blocks that are there.

    Raises:
        UserError: the folder cannot be written, holds something and neither flag was given, or was
            begun with other settings or from files that have changed since.
    """

    def __init__(
        self,
        name: str,
        settings: dict[str, str],
        files: list[InputFile],
        *,
        resume: bool = False,
        overwrite: bool = False,
    ) -> None:
        self.path = Path(os.path.abspath(name))
        self.shown = name
        self._manifest: dict[str, Any] = {
            "settings": settings,
            "files": {file.path: file.fingerprint() for file in files if os.path.exists(file.path)},
        }
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{name} is a file: --replicas writes a folder of one file a block")
        earlier = self._read_manifest()
        if earlier is None:
            if self.path.exists() and any(not f.name.startswith(".") for f in self.path.iterdir()):
                raise UserError(f"{name} holds files of others: name an empty folder, or none yet")
        elif resume:
            self._check_same(earlier)
        elif not overwrite:
            raise UserError(
                f"{name} holds results: --resume adds the blocks that are missing, --overwrite"
                " removes those that are there"
            )
        self._clear = overwrite

    def _read_manifest(self) -> dict[str, Any] | None:
        try:
            return json.loads((self.path / MANIFEST).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise UserError(f"{self.shown}/{MANIFEST}: cannot be read ({error})") from None

    def _check_same(self, earlier: dict[str, Any]) -> None:
        check_same(self.shown, earlier["settings"], self._manifest["settings"])
        for path, fingerprint in earlier["files"].items():
            if self._manifest["files"].get(path) != fingerprint:
                raise UserError(
                    f"{path} changed since {self.shown} was begun from it: --overwrite starts anew"
                )

    def open(self) -> None:
        """Make the folder, or clear what is not to be kept."""
        errors = self.path / ERRORS
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for file in [*self.path.iterdir(), *(errors.iterdir() if errors.exists() else ())]:
                # Hidden ones: halves that a kill left, and counts of deaths under an earlier run.
                mine = file.name.startswith(".") or (self._clear and file.suffix == ".jsonl")
                if mine and file.is_file():
                    file.unlink()
            write_whole(self.path / MANIFEST, json.dumps(self._manifest, indent=1).encode())
            errors.mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.shown}: cannot write ({error.strerror or error})") from None

    def has(self, block: Block) -> bool:
        return (self.path / block.name).exists()


def lines_of(rows: Iterable[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)
