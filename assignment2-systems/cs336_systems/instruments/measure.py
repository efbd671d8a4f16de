"""The tools of every measurement: timing, failures as rows, progress, a table, and a file in results/."""

import gc
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from cs336_basics.run_folder import environment, write_atomically
from cs336_systems.instruments.options.common import Measurement

#: The "status" of a row. OK: the measurement succeeded. UNSUPPORTED: its "reason" says why it did not.
OK = "ok"
OUT_OF_MEMORY = "out of memory"
UNSUPPORTED = "unsupported"

#: Packages whose versions a file of results records.
PACKAGES = ("torch", "numpy", "triton")

Row = dict[str, Any]


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work, so that a reading of the host's clock is meaningful."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def now_ms(device: torch.device) -> float:
    """Read the host's clock in milliseconds, after the device has finished its work."""
    synchronize(device)
    return time.perf_counter() * 1e3


def times_ms(function: Callable[[], object], device: torch.device, warmup: int, steps: int) -> list[float]:
    """Time each of `steps` calls after `warmup` others, in milliseconds, each between two synchronizations."""
    for _ in range(warmup):
        function()
    times = []
    for _ in range(steps):
        started = now_ms(device)
        function()
        times.append(now_ms(device) - started)
    return times


def median_ms(function: Callable[[], object], device: torch.device, warmup_ms: int = 25, rep_ms: int = 100) -> float:
    """Return the median time of a call in milliseconds, over about `rep_ms` of calls after `warmup_ms` of warm-up.

    On a GPU `triton.testing.do_bench` does it: events around each call, and the L2 cache cleared before it.
    """
    if device.type == "cuda":
        from triton.testing import do_bench

        return float(do_bench(function, warmup=warmup_ms, rep=rep_ms, return_mode="median"))
    (first,) = times_ms(function, device, warmup=0, steps=1)
    calls = max(3, min(100, int(rep_ms / max(first, 1e-3))))
    return statistics.median(times_ms(function, device, warmup=0, steps=calls))


def peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """Return the most CUDA memory that tensors held while `function` ran, in bytes."""
    torch.cuda.reset_peak_memory_stats(device)
    function()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)


def extra_bytes(function: Callable[[], object], device: torch.device) -> int:
    """Return the most CUDA memory that tensors held while `function` ran, minus what they held before, in bytes."""
    before = torch.cuda.memory_allocated(device)
    return peak_bytes(function, device) - before


def or_out_of_memory(function: Callable[[], Row]) -> Row:
    """Return the row that `function` measures, or {"status": "out of memory"}; free what it had allocated."""
    try:
        return function()
    except torch.OutOfMemoryError:
        return {"status": OUT_OF_MEMORY}
    finally:
        if torch.cuda.is_available():
            gc.collect()
            torch.cuda.empty_cache()


def try_measure(function: Callable[[], Row]) -> Row:
    """Return the row that `function` measures, with a "status" other than "ok" if memory or a kernel is missing.

    The reason of an "unsupported" row is the first line of its error, or what PyTorch warned about before it.
    """

    def attempt() -> Row:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                return {"status": OK} | function()
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                if "out of memory" in str(error):  # as compilers wrap it
                    raise torch.OutOfMemoryError(str(error)) from error
                if "CUDA error" in str(error):  # the device is lost: later rows would be meaningless
                    raise
                return {"status": UNSUPPORTED, "reason": _reason(error, [str(one.message) for one in caught])}

    return or_out_of_memory(attempt)


def _reason(error: Exception, warned: list[str]) -> str:
    lines = [text.splitlines()[0].split(" (Triggered")[0] for text in warned if text]
    why = [line for line in lines if not line.endswith("because:") and "runtime disabled" not in line]
    if "o available kernel" in str(error) and why:  # PyTorch has warned about what each kernel lacks
        return why[0]
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def cartesian(**axes: Sequence[object]) -> list[Row]:
    """Return a row for each combination of the axes' values; the last axis changes fastest."""
    return [dict(zip(axes, values)) for values in product(*axes.values())]


def check_cases(cases: Sized) -> None:
    """Raise a ValueError if there are none."""
    if not cases:
        raise ValueError("there is nothing to measure: an option that takes several values was given none")


def run_grid(cases: list[Row], measure: Callable[[Row], Row], file: "ResultFile") -> list[Row]:
    """Measure every case. Its row consists of the case, what `measure` returns, and the status (see `try_measure`).

    All rows so far are written after each case, so that an interrupted grid keeps them.
    """
    check_cases(cases)
    rows: list[Row] = []
    with progress(len(cases)) as start:
        for case in cases:
            start(" ".join(str(value) for value in case.values() if not isinstance(value, float)))
            rows.append(case | try_measure(lambda case=case: measure(case)))  # type: ignore[misc]
            file.write(rows)
    return rows


@contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """Show a progress bar in a terminal; yield a function to call with the name of each case as it begins."""
    console = Console(stderr=True)
    begun = 0
    with Progress(
        MofNCompleteColumn(), BarColumn(bar_width=20), TimeElapsedColumn(), TextColumn("{task.description}"),
        console=console, transient=True, disable=not console.is_terminal,
    ) as bar:  # fmt: skip
        task = bar.add_task("", total=total)

        def start(what: str) -> None:
            nonlocal begun
            bar.update(task, completed=begun, description=what)
            begun += 1

        yield start


def print_table(
    title: str,
    rows: list[Row],
    columns: Sequence[str] | None = None,
    *,
    settings: Sequence[str] = (),
    common: Row | None = None,
    digits: int = 3,
) -> None:
    """Print rows as a table, and below it the reasons of rows that were not measured.

    Args:
        title: a line above the table.
        rows: cells that are lists are left out; so is the status if all rows are "ok".
        columns: keys to show, in this order. Default: all, in the order in which they first appear.
        settings: columns that move into the title if they have one value in all rows.
        common: other settings to show in the title.
        digits: significant digits of floating-point numbers.
    """
    keys = dict.fromkeys(key for row in rows for key in row if not isinstance(row[key], list | dict))
    shared = {key: rows[0][key] for key in settings if key in keys and len({row.get(key) for row in rows}) == 1}
    if said := ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in (shared | (common or {})).items()):
        title = f"{title}: {said}"
    chosen = [key for key in columns or keys if key in keys and key not in (*shared, "status", "reason")]
    if any(row.get("status", OK) != OK for row in rows):
        chosen.append("status")

    table = Table()
    for key in chosen:
        numeric = any(isinstance(row.get(key), int | float) for row in rows)
        # If space is short, the headers of numbers take two lines, and no word is cut off.
        header = key.replace("_", " ")
        longest = max(map(len, header.split()), default=0)
        table.add_column(header, justify="right" if numeric else "left", no_wrap=not numeric, min_width=longest)
    for row in rows:
        table.add_row(*(_cell(row.get(key), digits) for key in chosen))
    console = Console()
    console.print(f"\n{title}", style="bold", highlight=False, markup=False)
    console.print(table)
    named = "attention" if "attention" in keys else next(iter(keys), "")
    for line in dict.fromkeys(f"{row.get(named)}: {row['reason']}" for row in rows if "reason" in row):
        console.print(line, highlight=False, markup=False)


def _cell(value: object, digits: int) -> str:
    if value is None:
        return ""
    if not isinstance(value, float) or not math.isfinite(value) or value == 0:
        return f"{value:g}" if isinstance(value, float) else str(value)
    exponent = int(f"{value:.{digits - 1}e}".partition("e")[2])  # exponent of the rounded number
    if exponent < -4:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{max(0, digits - 1 - exponent)}f}"


class ResultFile:
    """A file of rows and their origin: what was measured, command, device, versions, commit, date.

    Args:
        folder, name: the file is <folder>/<name>.json.
        what: what is measured.
        device: the device it is measured on.
        extra: other settings to record.
    """

    def __init__(self, folder: Path, name: str, what: str, device: torch.device, **extra: Any) -> None:
        self.path = folder / f"{name}.json"
        self.head = {"what": what, **environment(device, PACKAGES), **extra}

    def write(self, rows: list[Row], **extra: Any) -> None:
        """Write the file, replacing an earlier one."""
        write_atomically(self.path, json.dumps({**self.head, **extra, "rows": rows}, indent=1) + "\n")

    def announce(self) -> None:
        """Print the path of the file."""
        print(f"written: {self.path}")


def result_file(options: Measurement, what: str, device: torch.device, **extra: Any) -> ResultFile:
    """Return the file that `--name` and `--out` ask for; see `ResultFile`."""
    return ResultFile(options.out, options.name, what, device, **extra)


def write_result(options: Measurement, what: str, rows: list[Row], device: torch.device, **extra: Any) -> Path:
    """Write `rows` and their origin to the file that `--name` and `--out` ask for, and print its path."""
    file = result_file(options, what, device, **extra)
    file.write(rows)
    file.announce()
    return file.path
