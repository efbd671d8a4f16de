"""What the benchmarks share: interleaved timing, and the printing and writing of rows."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.results import write_result


def interleaved(candidates: dict[str, Callable[[], object]], repeats: int) -> dict[str, dict[str, float]]:
    """Time candidates in turn, `repeats` times each, so that a noisy minute of the machine affects all of them.

    Returns:
        For each the median, the fastest and the slowest time in seconds.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, function in candidates.items():
            started = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - started)
    return {
        name: {"median_s": statistics.median(taken), "min_s": min(taken), "max_s": max(taken)}
        for name, taken in times.items()
    }


def write_rows(name: str, what: str, rows: list[dict[str, Any]], folder: Path, device: str = "cpu") -> None:
    """Print the rows of a benchmark and write them as a result."""
    for row in rows:
        shown = [f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()]
        print("  ".join(shown))
    write_result(name, what, {"rows": rows}, folder, device)
