"""From outcomes to a table, JSON, a plot of the alphas, and files of answers."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proxy_vllm.errors import UserError
from proxy_vllm.eval.gap import gap_closed, gap_closed_interval
from proxy_vllm.eval.harness import Marks, Outcome

# Rows of the table from the weakest to the ceiling, where they were run.
LABELS = {
    "base": "base",
    "expert": "expert alone",
    "proxy": "proxy-tuned",
    "tuned": "directly tuned",
}


@dataclass(frozen=True)
class Report:
    """All outcomes of one evaluation.

    Args:
        rows: outcome by row: ``base``, ``expert``, ``proxy``, ``tuned``, or names of the user's.
        sweep: outcome by alpha, lowest first; empty without ``--alphas``.
        alpha: the proxy row's strength; None where answers are scored that were made elsewhere.
    """

    rows: dict[str, Outcome]
    sweep: dict[float, Outcome]
    alpha: float | None

    @property
    def names(self) -> list[str]:
        known = [name for name in LABELS if name in self.rows]
        return known + [name for name in self.rows if name not in LABELS]

    def metrics(self) -> list[tuple[str, str]]:
        """(task, metric) pairs in the tasks' order."""
        any_row = next(iter(self.rows.values()))
        return [(task, metric) for task, found in any_row.marks.items() for metric in found]

    def row_marks(self, row: str, task: str, metric: str) -> Marks | None:
        return self.rows[row].marks[task].get(metric) if row in self.rows else None

    def gap(self, task: str, metric: str) -> tuple[float | None, tuple[float, float] | None]:
        """Gap closed and its 95 % interval; None where a row is missing or the gap is zero."""
        found = [self.row_marks(row, task, metric) for row in ("base", "proxy", "tuned")]
        marks = [mark for mark in found if mark is not None]
        if len(marks) < 3:
            return None, None
        value = gap_closed(*(mark.value for mark in marks))
        together = {len(mark.each) for mark in marks}
        if value is None or not all(m.is_mean for m in marks) or len(together) != 1:
            return value, None
        base, proxy, tuned = (mark.each for mark in marks)
        return value, gap_closed_interval(base, proxy, tuned)

    def as_dict(self) -> dict[str, Any]:
        tasks: dict[str, Any] = {}
        for task, metric in self.metrics():
            value, interval = self.gap(task, metric)
            found = {row: self.row_marks(row, task, metric) for row in self.names}
            tasks.setdefault(task, {})[metric] = {
                "n": max((m.n for m in found.values() if m is not None), default=0),
                "higher_is_better": all(m.higher_is_better for m in found.values() if m),
                "rows": {row: _numbers(mark) for row, mark in found.items()},
                "gap_closed": value,
                "gap_closed_ci95": list(interval) if interval else None,
                "alphas": [
                    {"alpha": alpha, **(_numbers(outcome.marks[task].get(metric)) or {})}
                    for alpha, outcome in self.sweep.items()
                ],
            }
        groups = {row: self.rows[row].groups for row in self.names if self.rows[row].groups}
        return {"alpha": self.alpha, "tasks": tasks, **({"groups": groups} if groups else {})}


def _numbers(mark: Marks | None) -> dict[str, float | None] | None:
    return None if mark is None else {"value": mark.value, "stderr": mark.stderr}


def show(report: Report) -> None:
    """Print a line for each metric, and a table of the alphas."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title="scores" if report.alpha is None else f"scores, alpha {report.alpha:g}")
    for heading in ("task", "metric", "n", ""):
        table.add_column(heading)
    table.add_column("score", justify="right")
    for task, metric in report.metrics():
        marks = {row: report.row_marks(row, task, metric) for row in report.names}
        first = next(mark for mark in marks.values() if mark is not None)
        arrow = "higher is better" if first.higher_is_better else "lower is better"
        name = (task, f"{metric}\n({arrow})", str(first.n))
        lines = {LABELS.get(row, row): _cell(mark) for row, mark in marks.items()}
        if (gap := _gap_cell(report, task, metric)) != "-":
            lines["gap closed"] = gap
        table.add_row(*name, "\n".join(lines), "\n".join(lines.values()), end_section=True)
    console.print(table, markup=False)
    if report.sweep:
        table = Table(title="by alpha")
        table.add_column("alpha", justify="right")
        for task, metric in report.metrics():
            table.add_column(f"{task}\n{metric}", justify="right")
        for alpha, outcome in report.sweep.items():
            cells = [_cell(outcome.marks[task].get(metric)) for task, metric in report.metrics()]
            table.add_row(f"{alpha:g}", *cells)
        console.print(table, markup=False)


def _cell(mark: Marks | None) -> str:
    if mark is None:
        return "-"
    return f"{mark.value:.4f}" + (f" ± {mark.stderr:.4f}" if mark.stderr is not None else "")


def _gap_cell(report: Report, task: str, metric: str) -> str:
    value, interval = report.gap(task, metric)
    if value is None:
        return "-"
    return f"{value:.3f}" + (f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else "")


def write(report: Report, folder: Path, facts: dict[str, Any]) -> None:
    """Write ``report.json``, a plot for each task with alphas, and each row's answers.

    Raises:
        UserError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        numbers = {**report.as_dict(), **facts}
        (folder / "report.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
        for row in report.names:
            _write_answers(folder / "answers" / f"{row}.jsonl", report.rows[row])
        for alpha, outcome in report.sweep.items():
            _write_answers(folder / "answers" / f"alpha_{alpha:g}.jsonl", outcome)
    except OSError as error:
        raise UserError(f"--output {folder}: {error.strerror}") from error
    if report.sweep:
        from proxy_vllm.eval.plot import plot_alphas

        for task in dict.fromkeys(task for task, _ in report.metrics()):
            plot_alphas(report, task, folder / f"{task}.png")


def _write_answers(file: Path, outcome: Outcome) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8") as out:
        for task, lines in outcome.answers.items():
            out.writelines(
                json.dumps({"task": task, **line}, ensure_ascii=False) + "\n" for line in lines
            )


def write_for_judges(report: Report, folder: Path, tasks: dict[str, Any]) -> list[Path]:
    """Write what a judge reads, for tasks whose file says what that is (``metadata: judge:``).

    The fields are Jinja over the document, ``answer`` and ``row``.
    """
    from lm_eval.utils import apply_template

    files = []
    for name, task in tasks.items():
        fields: dict[str, str] = (task.config.metadata or {}).get("judge", {})
        docs = list(task.eval_docs) if fields else []
        for row in report.names if fields else ():
            out = []
            for line in report.rows[row].answers[name]:
                seen = {**docs[line["doc_id"]], "answer": line["text"].strip(), "row": row}
                out.append({key: apply_template(text, seen) for key, text in fields.items()})
            file = folder / "judge" / f"{name}.{row}.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(out, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            files.append(file)
    return files
