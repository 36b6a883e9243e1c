"""How much of the gap between a base and its ceiling proxy-tuning closes."""

from collections.abc import Sequence

import numpy as np


def gap_closed(base: float, proxy: float, tuned: float) -> float | None:
    """(proxy - base) / (tuned - base); None where base and tuned are equally good."""
    return (proxy - base) / (tuned - base) if tuned != base else None


def gap_closed_interval(
    base: "Sequence[float] | np.ndarray",  # [n], one mark a document, nan where it does not count
    proxy: "Sequence[float] | np.ndarray",  # [n]
    tuned: "Sequence[float] | np.ndarray",  # [n]
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float] | None:
    """95 % percentile bootstrap over documents, the three rows resampled together.

    For metrics that are means of marks. None where no resample tells base and tuned apart.
    """
    marks = np.asarray([base, proxy, tuned], dtype=np.float64)  # [3, n]
    drawn = np.random.default_rng(seed).integers(marks.shape[1], size=(resamples, marks.shape[1]))
    counts = ~np.isnan(marks)[:, drawn]  # [3, resamples, n]
    sums = np.where(counts, np.nan_to_num(marks)[:, drawn], 0.0).sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        low, middle, high = sums / counts.sum(-1)  # each [resamples]
        closed = (middle - low) / (high - low)
    closed = closed[np.isfinite(closed)]
    if not closed.size:
        return None
    return float(np.percentile(closed, 2.5)), float(np.percentile(closed, 97.5))
