"""Score answers that were made elsewhere, through the harness and without an engine.

A file has a JSON object a line: ``text`` (or ``output``, or ``model_output``), optionally
``doc_id``, the document's number in the task's data, and ``task`` where several tasks are scored.
Files of ``proxy-vllm eval --output`` and ``proxy-vllm generate`` can be scored as they are.
"""

import json
from pathlib import Path
from typing import Any

from lm_eval.api.model import LM

from proxy_vllm.errors import UserError
from proxy_vllm.eval.harness import HarnessOptions, Outcome, evaluate

_TEXT = ("text", "output", "model_output")


class FinishedAnswers(LM):
    """A model of the harness that has answered already.

    Args:
        source: the file, for messages.
        answers: text by task and by the number of the harness's request.
    """

    def __init__(self, source: str, answers: dict[str, list[str]]) -> None:
        super().__init__()
        self._source = source
        self._answers = answers

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        return [self._answers[request.task_name][request.doc_id] for request in requests]

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
        names = ", ".join(sorted({request.task_name for request in requests}))
        raise UserError(
            f"--score {self._source}: {names} is marked by probabilities, which finished answers do"
            " not have; tasks that generate text can be scored"
        )

    loglikelihood_rolling = loglikelihood


def score(source: str, tasks: dict[str, Any], options: HarnessOptions) -> Outcome:
    """The outcome of a file of answers.

    Args:
        source: the file.
        tasks: the loaded tasks by name.
        options: as for the run that is scored; ``limit`` is not read.

    Raises:
        UserError: a line that cannot be read, or that belongs to no document.
    """
    found: dict[str, dict[int, str]] = {name: {} for name in tasks}
    numbered: dict[str, bool] = {}
    for number, line in _lines(source):
        where = f"--score {source}, line {number}"
        task = _task_of(line, where, tasks)
        numbered.setdefault(task, "doc_id" in line)
        if numbered[task] != ("doc_id" in line):
            raise UserError(f"{where}: doc_id stands in every line of a task or in none")
        doc_id = line.get("doc_id", len(found[task]))
        size = len(tasks[task].eval_docs)
        if not isinstance(doc_id, int) or not 0 <= doc_id < size:
            raise UserError(f"{where}: doc_id {doc_id!r}: {task} has documents 0 to {size - 1}")
        if doc_id in found[task]:
            raise UserError(f"{where}: document {doc_id} of {task} has an answer already")
        found[task][doc_id] = _text_of(line, where)
    for task, answers in found.items():
        size = len(tasks[task].eval_docs)
        if not answers:
            raise UserError(f"--score {source}: no answer to {task}")
        if not numbered[task] and len(answers) != size:
            raise UserError(
                f"--score {source}: {len(answers)} answers, {task} has {size} documents: answer"
                " all, or name each line's document with doc_id"
            )
    documents = {task: sorted(answers) for task, answers in found.items()}
    texts = {task: [found[task][index] for index in ids] for task, ids in documents.items()}
    return evaluate(FinishedAnswers(source, texts), options, samples=documents)


def _lines(source: str) -> Any:
    try:
        text = Path(source).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UserError(f"--score {source}: {reason}") from None
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"--score {source}, line {number}: not JSON ({error.msg})") from None
        if not isinstance(value, dict):
            raise UserError(f"--score {source}, line {number}: an object is needed")
        yield number, value


def _task_of(line: dict[str, Any], where: str, tasks: dict[str, Any]) -> str:
    if "task" not in line and len(tasks) == 1:
        return next(iter(tasks))
    task = line.get("task")
    if task not in tasks:
        raise UserError(f"{where}: task is {task!r}: it must be one of {', '.join(tasks)}")
    return task


def _text_of(line: dict[str, Any], where: str) -> str:
    texts = [line[name] for name in _TEXT if name in line]
    if len(texts) != 1 or not isinstance(texts[0], str):
        raise UserError(f"{where}: the answer is a string, one of {', '.join(_TEXT)}")
    return texts[0]
