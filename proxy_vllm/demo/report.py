"""From marked answers to numbers: accuracies, gap closed with its interval, table, JSON."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from proxy_vllm.demo.problems import Problem, is_right, wanted
from proxy_vllm.eval.gap import gap_closed, gap_closed_interval

# Column order of the table, and the keys of the JSON file.
SYSTEMS = {
    "base": "base",
    "expert": "expert alone",
    "proxy": "proxy-tuned",
    "tuned": "directly tuned",
}


NO_ADAPTER = "no adapter"
SWITCHING = "experts as adapters, switched per request"


@dataclass(frozen=True)
class Report:
    """Answers of the four systems to the same problems, by system name.

    `switched` are those of one engine whose expert is each request's adapter, by its name.
    """

    problems: Sequence[Problem]
    answers: dict[str, list[str]]
    alpha: float
    switched: dict[str, list[str]] = field(default_factory=dict)

    def own_words(self, way: str) -> float:
        """Share of answers exactly as an adapter words them; without one, as the base alone did."""
        texts = self.switched[way]
        if way == NO_ADAPTER:
            same = [a == b for a, b in zip(texts, self.answers["base"], strict=True)]
        else:
            pairs = zip(texts, self.problems, strict=True)
            same = [text.strip() == wanted(way, problem) for text, problem in pairs]
        return sum(same) / len(same)

    def right(self, system: str) -> np.ndarray:  # [n] float64, 0 or 1
        texts = self.answers[system]
        marks = [is_right(p, t) for p, t in zip(self.problems, texts, strict=True)]
        return np.asarray(marks, dtype=np.float64)

    def accuracy(self, system: str, rude: bool | None = None) -> float:
        """Share answered rightly, of all problems or of the rude or kind ones (nan if none)."""
        chosen = [rude is None or p.rude == rude for p in self.problems]
        marks = self.right(system)[np.asarray(chosen)]
        return float(marks.mean()) if marks.size else float("nan")

    def gap_closed(self) -> float | None:
        """(proxy - base) / (tuned - base); None where base and tuned are equally good."""
        return gap_closed(*(self.accuracy(s) for s in ("base", "proxy", "tuned")))

    def gap_closed_interval(self, resamples: int = 2000) -> tuple[float, float] | None:
        """95 % bootstrap interval over problems."""
        base, proxy, tuned = (self.right(s) for s in ("base", "proxy", "tuned"))
        return gap_closed_interval(base, proxy, tuned, resamples=resamples)

    def samples(self, count: int = 3) -> list[int]:
        """Indices to show: the first kind questions, and one rude one. Not picked by outcome."""
        kind = [i for i, p in enumerate(self.problems) if not p.rude]
        rude = [i for i, p in enumerate(self.problems) if p.rude][:1]
        return (kind[: count - len(rude)] + rude)[:count]

    def as_dict(self) -> dict:
        interval = self.gap_closed_interval()
        return {
            **{system: self.accuracy(system) for system in SYSTEMS},
            "gap_closed": self.gap_closed(),
            "gap_closed_ci95": list(interval) if interval else None,
            "adapters": {way: self.own_words(way) for way in self.switched},
            "n": len(self.problems),
            "alpha": self.alpha,
        }


def show(report: Report) -> None:
    """Print the table of accuracies and three sample answers side by side."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title=f"{len(report.problems)} held-out problems, greedy")
    table.add_column("")
    for heading in ("accuracy", "kind questions", "rude questions"):
        table.add_column(heading, justify="right")
    for system, label in SYSTEMS.items():
        shares = (report.accuracy(system, rude) for rude in (None, False, True))
        table.add_row(label, *(f"{share:.3f}" for share in shares))
    console.print(table)

    gap, interval = report.gap_closed(), report.gap_closed_interval()
    if gap is None or interval is None:
        console.print("gap closed: undefined, base and directly tuned are equally good")
    else:
        console.print(
            f"gap closed = (proxy - base) / (tuned - base) = {gap:.3f} "
            f"(95 % bootstrap interval {interval[0]:.3f} to {interval[1]:.3f}), "
            f"alpha {report.alpha:g}"
        )

    if report.switched:
        _show_switching(console, report)
    table = Table(title="sample answers", show_lines=True)
    for heading in ("question", *SYSTEMS.values()):
        table.add_column(heading, overflow="fold")
    for index in report.samples():
        problem = report.problems[index]
        cells = (report.answers[system][index].strip() for system in SYSTEMS)
        table.add_row(f"{problem.question}\n(wanted: {problem.answer})", *cells)
    console.print(table, markup=False)


def _show_switching(console: Any, report: Report) -> None:
    """One batch of one engine: the base and two behaviours, each request its own."""
    from rich.table import Table

    table = Table(title=SWITCHING, show_lines=True)
    for heading in ("request", "answers as they should be", "a kind question", "a rude one"):
        table.add_column(heading, overflow="fold")
    shown = [next((i for i, p in enumerate(report.problems) if p.rude == r), None) for r in (0, 1)]
    for way, texts in report.switched.items():
        what = "the base's, word for word" if way == NO_ADAPTER else "in its own words"
        cells = ("" if index is None else texts[index].strip() for index in shown)
        table.add_row(way, f"{report.own_words(way):.3f} ({what})", *cells)
    console.print(table, markup=False)
