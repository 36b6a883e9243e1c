"""Memory, file handles and threads of a process and of all that it has started, over time."""

import threading
import time
from typing import Any

import psutil

FIELDS = ("rss_mib", "handles", "threads")
# The shortest second half that tells growth from caches that fill, and open connections.
JUDGED_MINUTES = 1.0


class Watcher(threading.Thread):
    """Samples every ``seconds`` until it is stopped."""

    def __init__(self, root: psutil.Process, seconds: float = 10.0) -> None:
        super().__init__(daemon=True)
        self.root, self.seconds = root, seconds
        self.begun = time.monotonic()
        self.samples: dict[str, list[tuple[float, ...]]] = {}
        self.ended = threading.Event()

    def run(self) -> None:
        while not self.ended.wait(self.seconds):
            self.sample()

    def sample(self) -> None:
        now = round(time.monotonic() - self.begun, 1)
        try:
            processes = [self.root, *self.root.children(recursive=True)]
        except psutil.Error:
            return
        for process in processes:
            try:
                with process.oneshot():
                    row = (
                        now,
                        round(process.memory_info().rss / 2**20, 1),
                        process.num_fds(),
                        process.num_threads(),
                    )
                    name = f"{name_of(process)} {process.pid}"
            except psutil.Error:
                continue
            self.samples.setdefault(name, []).append(row)

    def stop(self) -> dict[str, Any]:
        """Of each process that was seen often enough: first and last values, and slopes."""
        self.ended.set()
        self.join()
        return {name: trend(rows) for name, rows in self.samples.items() if len(rows) >= 4}


def name_of(process: psutil.Process) -> str:
    words = process.cmdline() or [process.name()]
    if "EngineCore" in words[0] or "Ray" in words[0] or "ray::" in words[0]:
        return words[0].split()[0]
    if "multiprocessing" in " ".join(words):
        return "child"
    return " ".join(word.rsplit("/", 1)[-1] for word in words[:4])


def trend(rows: list[tuple[float, ...]]) -> dict[str, Any]:
    """Least-squares slope a minute over the second half: by then caches and pools are full."""
    late = rows[len(rows) // 2 :]
    minutes = (late[-1][0] - late[0][0]) / 60
    found: dict[str, Any] = {"samples": len(rows), "minutes_after_warm_up": round(minutes, 2)}
    for i, field in enumerate(FIELDS, 1):
        slope = least_squares([r[0] / 60 for r in late], [r[i] for r in late])
        found[field] = {
            "first": rows[0][i],
            "middle": late[0][i],
            "last": rows[-1][i],
            "most": max(r[i] for r in rows),
            "slope_per_minute": round(slope, 3),
        }
    return found


def least_squares(x: list[float], y: list[float]) -> float:
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    spread = sum((a - mean_x) ** 2 for a in x)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y)) / spread if spread else 0.0


def judged(trends: dict[str, Any]) -> dict[str, Any]:
    """Those of processes that were watched for long enough to tell growth."""
    return {n: t for n, t in trends.items() if t["minutes_after_warm_up"] >= JUDGED_MINUTES}


def grown(trends: dict[str, Any], mib: float, others: float) -> list[str]:
    """Processes whose second half, if it is long enough, grew by more than this by its slope."""
    found = []
    for name, each in judged(trends).items():
        for field, most in zip(FIELDS, (mib, others, others)):
            growth = each[field]["slope_per_minute"] * each["minutes_after_warm_up"]
            if growth > most:
                found.append(f"{name}: {field} grew by {growth:.1f} in the second half")
    return found
