"""What all measurements share: timing, running out of memory as a result, a table, and a file in results/."""

import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from cs336_basics.run_log import environment, write_atomically

#: What stands in a row where a measurement did not fit into the device's memory.
OUT_OF_MEMORY = "out of memory"

Row = dict[str, Any]


def default_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what was asked of it, so that a host clock means something."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_ms(function: Callable[[], object], device: torch.device, warmup_ms: int = 25, rep_ms: int = 100) -> float:
    """The median time of a call in milliseconds, over about `rep_ms` of calls after `warmup_ms` of warm-up.

    On a GPU by `triton.testing.do_bench`: events around each call, the L2 cache cleared before it.
    """
    if device.type == "cuda":
        from triton.testing import do_bench

        return float(do_bench(function, warmup=warmup_ms, rep=rep_ms, return_mode="median"))
    started = time.perf_counter()
    function()
    first = (time.perf_counter() - started) * 1e3
    taken = []
    for _ in range(max(3, min(100, int(rep_ms / max(first, 1e-3))))):
        started = time.perf_counter()
        function()
        taken.append((time.perf_counter() - started) * 1e3)
    return statistics.median(taken)


def or_out_of_memory(function: Callable[[], Row]) -> Row:
    """The row that `function` measures, or {"status": "out of memory"}; what it had allocated is freed."""
    try:
        return function()
    except torch.OutOfMemoryError:
        return {"status": OUT_OF_MEMORY}
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """The most CUDA memory that tensors held while `function` ran, in bytes."""
    torch.cuda.reset_peak_memory_stats(device)
    function()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)


def show(title: str, rows: list[Row]) -> None:
    """Print rows as a table; its columns are the keys in the order in which they first appear."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = Table(title=title, title_justify="left")
    for column in columns:
        numeric = any(isinstance(row.get(column), int | float) for row in rows)
        table.add_column(column.replace("_", " "), justify="right" if numeric else "left")
    for row in rows:
        table.add_row(*(_cell(row.get(column)) for column in columns))
    Console().print(table)


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write_result(folder: Path, name: str, what: str, rows: list[Row], device: torch.device, **extra: Any) -> Path:
    """Write `rows`, and where they come from, to `<folder>/<name>.json`."""
    path = folder / f"{name}.json"
    record = {"what": what, **environment(device), **extra, "rows": rows}
    write_atomically(path, json.dumps(record, indent=1) + "\n")
    print(f"written: {path}")
    return path
