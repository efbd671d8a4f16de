"""What the benchmarks share: interleaved timing and the file of a result."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

from experiments import results


def interleaved(candidates: dict[str, Callable[[], object]], repeats: int) -> dict[str, dict[str, float]]:
    """Time candidates in turn, `repeats` times each, so that a noisy minute of the machine meets all of them.

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


def write_result(name: str, what: str, rows: list[dict], folder: Path | None = None, device: str = "cpu") -> Path:
    """Show `rows`, and write them and where they come from to `results/<name>.json`."""
    for row in rows:
        print(
            "  ".join(
                f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
            )
        )
    return results.write_result(name, what, {"rows": rows}, folder or results.RESULTS, device)
