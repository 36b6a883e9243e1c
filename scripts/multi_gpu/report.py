"""Markdown table and plot of one JSON of `scripts/bench_multi_gpu.py`."""

from pathlib import Path
from typing import Any

COLUMNS = (
    "system", "replicas x TP", "load", "tokens/s", "per device", "efficiency",
    "TTFT p50 / p99 ms", "TPOT p50 / p99 ms", "floor ms", "ratio to base", "peak GiB",
    "rows = loop",
)  # fmt: skip


def markdown(result: dict[str, Any]) -> str:
    """A table, one line a row, after what was measured where."""
    lines = [
        f"`{result['command']}`",
        "",
        f"{result['device']}; commit {result['commit'][:12]}; "
        + ", ".join(f"{k} {v}" for k, v in result["versions"].items()),
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
    ]
    for row in result["rows"]:
        lines.append("| " + " | ".join(_cells(row)) + " |")
    lines += [
        "",
        "Batch rows are offline, each replica with that many requests at once; rate rows go to",
        "one server. Efficiency is the rate a device over that of the system's first line. The",
        "floor is the roofline's least decode step (of one row, for rates), the ratio to base the",
        "base's floor over it. The logprob way may choose other tokens; `rows = loop` is the share",
        "of texts that equal the Transformers loop's.",
    ]
    return "\n".join(lines) + "\n"


def _cells(row: dict[str, Any]) -> list[str]:
    load = f"batch {row['batch']}" if row["batch"] else f"{row['request_rate']:g}/s"
    head = [row["system"], f"{row['replicas']} x {row['tp']}", load]
    if row["error"]:
        why = row["error"].splitlines()[0].replace("|", "\\|")
        return [*head, f"failed: {why}", *[""] * (len(COLUMNS) - 4)]
    floor = row["floor"]

    def pair(value: dict | None) -> str:
        return f"{value['p50']:.1f} / {value['p99']:.1f}" if value else ""

    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}"

    return [
        *head, f"{row['output_tokens_per_s']:.1f}", f"{row['output_tokens_per_s_per_device']:.1f}",
        number(row["scaling_efficiency"]), pair(row["ttft_ms"]), pair(row["tpot_ms"]),
        number(floor["step_ms"] if floor else None), number(floor["ratio"] if floor else None),
        f"{row['peak_memory_bytes'] / 2**30:.2f}",
        number(row["rows_equal_to_loop"]),
    ]  # fmt: skip


def plot(result: dict[str, Any], path: Path) -> None:
    """Tokens a second of every row, and TPOT beside the floor."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [r for r in result["rows"] if not r["error"]]
    names = [" ".join(_cells(r)[:3]) for r in rows]
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(13, 1.5 + 0.32 * len(rows)), sharey=True, layout="constrained"
    )
    places = range(len(rows))
    systems = list(dict.fromkeys(r["system"] for r in rows))
    colours = [f"C{systems.index(r['system']) % 10}" for r in rows]
    left.barh(places, [r["output_tokens_per_s"] for r in rows], color=colours)
    left.set_yticks(places, names)
    left.invert_yaxis()
    left.set_xlabel("output tokens/s")
    right.barh(places, [(r["tpot_ms"] or {}).get("p50", 0) for r in rows], color=colours)
    for place, row in zip(places, rows):
        if row["floor"]:
            ends = (place - 0.4, place + 0.4)
            right.vlines(row["floor"]["step_ms"], *ends, color="black", label="roofline's floor")
    right.set_xlabel("TPOT p50, ms (black: the roofline's floor)")
    figure.suptitle(f"{result['device']}, commit {result['commit'][:12]}")
    figure.savefig(path)
    pyplot.close(figure)
