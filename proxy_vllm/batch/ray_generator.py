"""Proxy-tuned generation inside Ray Data: classes for ``ray.data.Dataset.map_batches``."""

import contextlib
import json
import math
import os
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proxy_vllm.batch.generator import Item, Result
from proxy_vllm.batch.ray_blocks import ERRORS, Block, BlockReader, lines_of
from proxy_vllm.batch.request import LineOptions, id_of, request_fields
from proxy_vllm.batch.settings import write_whole
from proxy_vllm.batch.shared import EngineFailure, SharedGenerator
from proxy_vllm.errors import UserError, one_line

if TYPE_CHECKING:
    import pyarrow

# After so many deaths of the engine while a block was in it, its lines run one by one.
_DEATHS_TOGETHER = 2
# After so many deaths while one line was alone in the engine, the line is given up.
_DEATHS_ALONE = 2
# More of them in one block are no fault of the lines.
_MOST_DEADLY_LINES = 4


def start_engine(llm_arguments: dict[str, Any]) -> Any:
    """A ``ProxyLLM`` for one Ray actor.

    Unless the environment says otherwise, the engine runs in the actor's own process: when that is
    killed, no process of the engine is left behind to hold the GPU that the next one needs.
    """
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    # vLLM binds threads to cores without knowing of engines beside it; Ray limits their number.
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    from proxy_vllm.llm import ProxyLLM

    arguments = dict(llm_arguments)
    if (arguments.get("tensor_parallel_size") or 1) > 1:
        # All ranks are on the actor's node; vLLM would otherwise look for Ray's placement group.
        arguments["distributed_executor_backend"] = (
            arguments.get("distributed_executor_backend") or "mp"
        )
    return ProxyLLM(**arguments)


class ProxyGenerator:
    """One engine in each actor, answering rows that have the fields of `proxy-vllm generate`.

    A row needs ``prompt`` (text, token ids, or a struct of them with ``base``, ``expert`` and
    ``antiexpert``) or ``messages``, and may have ``proxy_alpha`` and any field of
    ``vllm.SamplingParams``; null counts as absent, and other columns pass through. The
    columns ``text``, ``finish_reason``, ``prompt_tokens``, ``completion_tokens``, ``proxy_alpha``
    and ``error`` are added: a row that cannot be answered has its reason in ``error`` and nulls in
    the others, and harms no other row. ``n`` above 1 gives ``outputs`` in the place of ``text``.

    Args:
        sampling: fields for rows that do not set them: those of ``SamplingParams``, and
            ``chat_template_kwargs``, ``tools`` and the like.
        token_ids: add the column ``token_ids``.
        **llm_arguments: of ``proxy_vllm.ProxyLLM``; with ``tensor_parallel_size=T`` give
            ``num_gpus=T`` to ``map_batches``, which puts the T GPUs on one node. Without GPUs, give
            ``num_cpus`` and leave a CPU to Ray's own tasks, which read and write: actors that take
            all of them wait for rows for ever.

    Example::

        trio = {"model": "Qwen/Qwen2.5-7B", "expert": "Qwen/Qwen2.5-0.5B-Instruct",
                "antiexpert": "Qwen/Qwen2.5-0.5B"}
        rows = ray.data.read_parquet("prompts/").map_batches(
            ProxyGenerator, fn_constructor_kwargs={**trio, "sampling": {"max_tokens": 256}},
            batch_size=512, concurrency=2, num_gpus=1)
        rows.write_parquet("answers/")
    """

    def __init__(
        self,
        *,
        sampling: dict[str, Any] | None = None,
        token_ids: bool = False,
        **llm_arguments: Any,
    ) -> None:
        options = LineOptions(sampling or {}, token_ids)
        self._generator = SharedGenerator(start_engine(llm_arguments), options)

    def __call__(self, batch: "dict[str, Any] | pyarrow.Table") -> "pyarrow.Table":
        """Answer a batch in Ray Data's ``numpy`` or ``pyarrow`` format.

        Raises:
            EngineFailure: the engine broke down.
        """
        rows = rows_of(batch)
        known = request_fields()
        items: list[Item] = [
            (number, {name: value for name, value in row.items() if name in known})
            for number, row in enumerate(rows)
        ]
        results = self._generator.answer(items)
        return table_of([_answered(row, result) for row, result in zip(rows, results)])


def rows_of(batch: "dict[str, Any] | pyarrow.Table") -> list[dict[str, Any]]:
    """Rows of plain Python values."""
    if hasattr(batch, "to_pylist"):
        return batch.to_pylist()
    columns = {name: _nullable(_plain(column)) for name, column in batch.items()}
    return [dict(zip(columns, values)) for values in zip(*columns.values())]


def _nullable(column: list[Any]) -> list[Any]:
    """Undo what NumPy makes of integers of which some are null: floats, and NaN."""
    if not all(isinstance(value, float) for value in column) or not any(map(math.isnan, column)):
        return column
    there = [value for value in column if not math.isnan(value)]
    kind = int if all(value.is_integer() for value in there) else float
    return [None if math.isnan(value) else kind(value) for value in column]


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):  # NumPy arrays and scalars
        value = value.tolist()
    if isinstance(value, list):
        return [_plain(part) for part in value]
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    return value


def _answered(row: dict[str, Any], result: Result) -> dict[str, Any]:
    added = {**(result.output or {}), "error": result.error}
    added.pop("id", None)
    return {**row, **added}


def table_of(rows: list[dict[str, Any]]) -> "pyarrow.Table":
    """An Arrow table of rows, with columns that keep their type where a batch has only nulls."""
    import pyarrow as pa

    types = {
        "text": pa.string(),
        "finish_reason": pa.string(),
        "prompt_tokens": pa.int64(),
        "completion_tokens": pa.int64(),
        "proxy_alpha": pa.float64(),
        "error": pa.string(),
        "token_ids": pa.list_(pa.int64()),
    }
    always = [name for name in types if name != "token_ids"]
    names = dict.fromkeys(name for row in rows for name in row) | dict.fromkeys(always)
    return pa.table(
        {name: pa.array([row.get(name) for row in rows], types.get(name)) for name in names}
    )


class BlockWriter:
    """What a replica of `proxy-vllm generate --replicas` does: reads, answers and writes blocks.

    A block's output file appears when it is whole, under a name that follows from its input, and
    only rows of reports travel through Ray. So Ray Data may run a block again after a death, or
    twice at once: the file is the same. What is there already is not done again.

    Args:
        folder: for the output files; every node must see it, and the input, under the same path.
        llm_arguments: of ``proxy_vllm.ProxyLLM``.
        options: how rows are read and answered.
        skip_errors: leave out rows that cannot be answered and name them in ``_errors``; otherwise
            the block is not written, and its report names the first of them.
        plain_ids: rows without ``id`` get their number alone, not ``FILE:NUMBER``.
    """

    def __init__(
        self,
        folder: str,
        llm_arguments: dict[str, Any],
        options: LineOptions,
        *,
        skip_errors: bool = False,
        plain_ids: bool = False,
    ) -> None:
        self.folder = Path(folder)
        self.skip_errors = skip_errors
        self.plain_ids = plain_ids
        self.replica = _replica_name()
        self.broken: str | None = None
        self._reader = BlockReader()
        try:
            self._generator = SharedGenerator(start_engine(llm_arguments), options)
        except Exception as error:
            # An exception here would be wrapped by Ray and tried again; the report carries it.
            traceback.print_exc()
            self.broken = f"an engine did not start: {one_line(error)}"
        self.since = time.time()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Blocks in JSON, in the column ``block``, to their reports in JSON."""
        blocks = [Block.from_json(str(text)) for text in batch["block"]]
        return {"report": [json.dumps(self.write(block)) for block in blocks]}

    def write(self, block: Block) -> dict[str, Any]:
        """Answer one block and write its files.

        Returns:
            ``{"block", "replica", "since", "prompts", "errors", "completion_tokens"}``, ``since``
            being when the engine was ready; with ``"failed"``, a bad row or file that ends the
            run unless errors are skipped; with ``"fatal"``, what ends it in any case.
        """
        report: dict[str, Any] = {
            "block": block.name,
            "replica": self.replica,
            "since": self.since,
            "prompts": 0,
            "errors": 0,
            "completion_tokens": 0,
        }
        if self.broken is not None:
            return {**report, "fatal": self.broken}
        if (self.folder / block.name).exists():
            return report
        try:
            try:
                prefix = None if self.plain_ids else block.shown
                items = self._reader.read(block, id_prefix=prefix)
            except UserError as error:
                return self._unreadable(block, report, str(error))
            return self._write(block, report, items)
        except OSError as error:
            return {**report, "fatal": f"{self.folder}: cannot write ({error.strerror or error})"}
        except UserError as error:
            return {**report, "fatal": str(error)}
        except EngineFailure as error:
            # This process cannot answer anything any more. Ray starts another one in its place,
            # which asks how often the block was tried.
            traceback.print_exception(error)
            sys.stderr.flush()
            os._exit(1)

    def _unreadable(self, block: Block, report: dict[str, Any], reason: str) -> dict[str, Any]:
        if not self.skip_errors:
            return {**report, "failed": reason}
        row = {"file": block.shown, "line": None, "id": None, "error": reason}
        write_whole(self.folder / ERRORS / block.name, lines_of([row]))
        # Without an output file, so that a later run tries again.
        return {**report, "errors": 1, "said": [reason]}

    def _write(self, block: Block, report: dict[str, Any], items: list[Item]) -> dict[str, Any]:
        unread = [(number, str(data)) for number, data in items if isinstance(data, UserError)]
        if unread and not self.skip_errors:
            return {**report, "failed": f"{block.shown}:{unread[0][0]}: {unread[0][1]}"}
        results = self._answer(block, items)
        bad = [result for result in results if result.error is not None]
        reasons = [f"{block.shown}:{result.number}: {result.error}" for result in bad]
        if reasons and not self.skip_errors:
            return {**report, "failed": reasons[0]}
        # The reasons first: a block that has its output is not looked at again.
        error_file = self.folder / ERRORS / block.name
        error_file.unlink(missing_ok=True)
        if bad:
            write_whole(error_file, lines_of(r.refusal(file=block.shown) for r in bad))
        outputs = [result.output for result in results if result.output is not None]
        write_whole(self.folder / block.name, lines_of(outputs))
        return {
            **report,
            "prompts": len(results),
            "errors": len(bad),
            "completion_tokens": sum(result.completion_tokens for result in results),
            "said": reasons,
        }

    def _answer(self, block: Block, items: list[Item]) -> list[Result]:
        with _Tries(self.folder / f".{block.name}.tries") as tries:
            if tries.together < _DEATHS_TOGETHER:
                tries.add({"together": True})
                return self._generator.answer(items)
            return [self._answer_alone(item, tries) for item in items]

    def _answer_alone(self, item: Item, tries: "_Tries") -> Result:
        number, data = item
        if number in tries.done:
            return Result(**tries.done[number])
        if tries.alone.get(number, 0) >= _DEATHS_ALONE:
            deadly = sum(count >= _DEATHS_ALONE for count in tries.alone.values())
            if deadly > _MOST_DEADLY_LINES:
                raise UserError(
                    "engines die again and again, whatever they are asked: the replicas' logs"
                    " tell why (VLLM_LOGGING_LEVEL=DEBUG shows them here)"
                )
            request_id = id_of(number, data) if isinstance(data, dict) else None
            reason = f"the engine died {_DEATHS_ALONE} times answering this line alone"
            return Result(number, request_id, error=reason)
        tries.add({"alone": number})
        (result,) = self._generator.answer([item], alone=True)
        tries.add({"done": vars(result)})
        return result


class _Tries:
    """How often a block was begun and, line by line, what came of it: kept across deaths.

    The file goes when the block is answered.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.together = 0
        self.alone: dict[int, int] = {}
        self.done: dict[int, dict[str, Any]] = {}
        with contextlib.suppress(FileNotFoundError):
            for line in path.read_bytes().splitlines():
                with contextlib.suppress(ValueError):  # half a line, left by a death
                    self._count(json.loads(line))

    def _count(self, entry: dict[str, Any]) -> None:
        if "together" in entry:
            self.together += 1
        elif "alone" in entry:
            self.alone[entry["alone"]] = self.alone.get(entry["alone"], 0) + 1
        else:
            self.done[entry["done"]["number"]] = entry["done"]
            self.alone.pop(entry["done"]["number"], None)

    def add(self, entry: dict[str, Any]) -> None:
        with self._path.open("ab") as file:
            file.write(b"\n" + json.dumps(entry).encode() + b"\n")
        self._count(entry)

    def __enter__(self) -> "_Tries":
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        if kind is None or not issubclass(kind, EngineFailure):
            self._path.unlink(missing_ok=True)


def _replica_name() -> str:
    try:
        import ray

        started = ray.is_initialized() and ray.get_runtime_context().get_actor_id()
    except ImportError:
        started = None
    return started[:8] if started else f"process {os.getpid()}"
