"""One pass of the harness over the tasks, and the checks before any engine starts."""

import difflib
import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proxy_vllm.checks.hub import check_data_set
from proxy_vllm.errors import UserError, one_line
from proxy_vllm.eval import TASKS

if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager


@dataclass(frozen=True)
class HarnessOptions:
    """What to evaluate and how; names are those of ``lm_eval.simple_evaluate``."""

    tasks: tuple[str, ...]
    include_path: tuple[str, ...] = ()
    num_fewshot: int | None = None
    limit: float | None = None
    apply_chat_template: bool = False
    fewshot_as_multiturn: bool = False
    system_instruction: str | None = None
    gen_kwargs: str | None = None
    batch_size: str = "auto"


@dataclass
class Marks:
    """One metric of one task: its value over all documents, and the mark of each."""

    value: float
    stderr: float | None
    higher_is_better: bool
    # By document, as far as the marks are numbers; the value is their mean only where `is_mean`.
    each: list[float] = field(default_factory=list)
    is_mean: bool = False
    n: int = 0  # documents


@dataclass
class Outcome:
    """What one system did in all tasks."""

    marks: dict[str, dict[str, Marks]]  # task -> metric -> marks
    answers: dict[str, list[dict[str, Any]]]  # task -> lines for a file
    groups: dict[str, dict[str, float]]  # group of tasks -> metric -> value


def task_manager(options: HarnessOptions) -> "TaskManager":
    """The tasks of this package and of `--include-path`; the harness's own only where needed.

    Reading the harness's thousands of files takes ten seconds.
    """
    from lm_eval.tasks import TaskManager

    for folder in options.include_path:
        if not Path(folder).is_dir():
            raise UserError(f"--include-path {folder}: no such folder")
    folders: list[str | Path] = [TASKS, *options.include_path]
    manager = TaskManager(include_path=folders, include_defaults=False)
    if all(name in manager.all_tasks for name in options.tasks):
        return manager
    return TaskManager(include_path=folders)


def check_tasks(options: HarnessOptions) -> dict[str, Any]:
    """Load every task with its data, and return them by name.

    Raises:
        UserError: a task that is not known, or whose data or definition cannot be had.
    """
    if not options.tasks:
        raise UserError("--tasks: name one or more, such as gsm_paper")
    manager = task_manager(options)
    for name in options.tasks:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, 3, 0.5)
            hint = f"do you mean {' or '.join(near)}?" if near else "`lm_eval ls tasks` lists all"
            raise UserError(f"--tasks: no task {name!r}: {hint} (--include-path adds your own)")
    tasks: dict[str, Any] = {}
    for name in options.tasks:
        try:
            _check_data(name, manager)
            tasks |= manager.load([name])["tasks"]
        except UserError:
            raise
        except Exception as error:  # what data sets raise has no class in common
            raise UserError(_why_not(name, error)) from error
    return tasks


def _check_data(task: str, manager: "TaskManager") -> None:
    """Ask the hub once for a task's data set; loading it would ask six times."""
    import datasets
    from lm_eval.tasks._yaml_loader import load_yaml

    file = manager.task_index[task].yaml_path
    path = load_yaml(file, resolve_func=False).get("dataset_path") if file else None
    if not isinstance(path, str) or "/" not in path:  # `json` and the like read local files
        return
    cached = Path(datasets.config.HF_DATASETS_CACHE, path.replace("/", "___").lower())
    if not Path(path).exists() and not cached.exists():
        check_data_set(f"task {task!r}, data set", path)


def _why_not(name: str, error: Exception) -> str:
    """One line for a task that cannot be loaded, whatever raised it."""
    from huggingface_hub import constants

    text = one_line(error)[:300]
    if isinstance(error, ConnectionError) or "the Hub" in text:
        return (
            f"task {name!r}: its data cannot be had from {constants.ENDPOINT} ({text}): check the"
            " network and HF_ENDPOINT, or give a task file with local data (--include-path)"
        )
    return f"task {name!r} cannot be loaded: {type(error).__name__}: {text}"


def evaluate(
    model: "LM", options: HarnessOptions, samples: dict[str, list[int]] | None = None
) -> Outcome:
    """All tasks with one model.

    Args:
        model: a model of the harness.
        options: what to evaluate.
        samples: documents of each task, if not all (see ``lm_eval.simple_evaluate``).
    """
    from lm_eval import simple_evaluate

    found = simple_evaluate(
        model=model,
        tasks=list(options.tasks),
        task_manager=task_manager(options),
        num_fewshot=options.num_fewshot,
        limit=options.limit,
        samples=samples,
        apply_chat_template=options.apply_chat_template,
        fewshot_as_multiturn=options.fewshot_as_multiturn,
        system_instruction=options.system_instruction,
        gen_kwargs=options.gen_kwargs,
    )
    marks = {name: _marks(name, found) for name in found["samples"]}
    answers = {
        name: [_line(sample) for sample in _once(lines)] for name, lines in found["samples"].items()
    }
    groups = {
        name: {key: value for key, value in values.items() if _is_number(value) and "," in key}
        for name, values in found.get("groups", {}).items()
    }
    return Outcome(marks, answers, groups)


def _marks(task: str, found: Any) -> dict[str, Marks]:
    """The metrics of a task. A filter is named where it is not the only one."""
    values = found["results"][task]
    keys = [key for key in values if "," in key and "_stderr," not in key]
    filters = {key.split(",", 1)[1] for key in keys}
    out = {}
    for key in keys:
        metric, chosen = key.split(",", 1)
        if not _is_number(values[key]):
            continue
        stderr = values.get(f"{metric}_stderr,{chosen}")
        lines = [s for s in found["samples"][task] if s["filter"] == chosen]
        each = [s[metric] for s in sorted(lines, key=lambda s: s["doc_id"]) if metric in s]
        numbers = [float(mark) for mark in each] if all(map(_is_number, each)) else []
        counted = [mark for mark in numbers if not math.isnan(mark)]
        mean = math.fsum(counted) / len(counted) if counted else math.nan
        out[metric if len(filters) == 1 else key] = Marks(
            value=float(values[key]),
            stderr=float(stderr) if _is_number(stderr) else None,
            higher_is_better=found["higher_is_better"][task].get(metric) is not False,
            each=numbers,
            is_mean=len(numbers) == len(lines) and math.isclose(mean, values[key], abs_tol=1e-9),
            n=len(lines),
        )
    return out


def _once(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each document once, whatever the number of filters."""
    return sorted({s["doc_id"]: s for s in samples}.values(), key=lambda s: s["doc_id"])


def _line(sample: dict[str, Any]) -> dict[str, Any]:
    """A document's line in the file of answers, which `--score` reads again."""
    arguments = [argument[0] for argument in sample["arguments"]]
    line = {"doc_id": sample["doc_id"], "prompt": arguments[0]}
    if all(isinstance(text, str) for resps in sample["resps"] for text in resps):
        texts = sample["resps"][0]
        return {**line, "text": texts[0], **({"texts": texts} if len(texts) > 1 else {})}
    choices = [argument[1] for argument in sample["arguments"] if len(argument) > 1]
    return {**line, "choices": choices, "loglikelihoods": [r[0] for r in sample["resps"]]}


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, str)
