"""Metrics of one task by alpha, with the other rows as lines across."""

from pathlib import Path

from proxy_vllm.errors import UserError
from proxy_vllm.eval.report import LABELS, Report

# Apart from each other for colour-blind readers too; the dashes tell them apart without colour.
_ACROSS = {"base": ("#777777", ":"), "expert": ("#d55e00", "-."), "tuned": ("#009e73", "--")}


def check_plots() -> None:
    """Raise ``UserError`` where plots cannot be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"plots need matplotlib ({error}): pip install 'proxy_vllm[eval]'"
        ) from None


def plot_alphas(report: Report, task: str, file: Path) -> None:
    """Draw one panel for each metric. Raises ``UserError`` where the file cannot be written."""
    from matplotlib.figure import Figure

    metrics = [metric for name, metric in report.metrics() if name == task]
    figure = Figure(figsize=(5.2 * len(metrics), 3.8), layout="constrained")
    panels = figure.subplots(1, len(metrics), squeeze=False)[0]
    for panel, metric in zip(panels, metrics):
        found = {alpha: outcome.marks[task].get(metric) for alpha, outcome in report.sweep.items()}
        points = {alpha: mark for alpha, mark in found.items() if mark is not None}
        panel.errorbar(
            list(points),
            [mark.value for mark in points.values()],
            yerr=[1.96 * (mark.stderr or 0.0) for mark in points.values()],
            marker="o",
            capsize=3,
            color="#0072b2",
            label=LABELS["proxy"],
        )
        for row, (colour, dashes) in _ACROSS.items():
            mark = report.row_marks(row, task, metric)
            if mark is not None:
                panel.axhline(mark.value, color=colour, linestyle=dashes, label=LABELS[row])
        panel.set(title=task, xlabel="alpha", ylabel=metric)
        panel.grid(alpha=0.3)
        panel.legend(fontsize="small")
    try:
        figure.savefig(file, dpi=150)
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from error
