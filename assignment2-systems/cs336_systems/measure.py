"""What all measurements share: options, timing, failures as rows, progress, a table, and a file in results/."""

import gc
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from cs336_basics.run_log import environment, write_atomically

#: The "status" of a row. OK: it holds what was to be measured. UNSUPPORTED: its "reason" says why it does not.
OK = "ok"
OUT_OF_MEMORY = "out of memory"
UNSUPPORTED = "unsupported"

Row = dict[str, Any]
T = TypeVar("T")


def gpu_or_cpu(gpu: T, cpu: T) -> T:
    """The default of an option: one for a machine with a GPU, and one that a machine without can do in seconds."""
    return field(default_factory=lambda: gpu if torch.cuda.is_available() else cpu)


@dataclass(frozen=True)
class Measurement:
    """The options of every command."""

    device: str = gpu_or_cpu("cuda", "cpu")
    """cpu, cuda, or cuda:1, say. Default: a GPU if there is one."""
    name: str = "measurement"
    """The result is written to <out>/<name>.json."""
    out: Path = Path("results")
    """Folder for the result."""

    def result_file(self, what: str, device: torch.device, **extra: Any) -> "ResultFile":
        """The file that `name` and `out` ask for; see `ResultFile`."""
        return ResultFile(self.out, self.name, what, device, **extra)


def check_options(command: object, *names: str, least: int = 1) -> None:
    """Raise a ValueError if one of these numbers (or tuples of numbers) of a command is below `least`."""
    for name in names:
        value = getattr(command, name)
        for number in value if isinstance(value, tuple) else (value,):
            if number is not None and number < least:
                raise ValueError(f"--{name.replace('_', '-')} is {number}, but must be at least {least}")


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what was asked of it, so that a host clock means something."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def now_ms(device: torch.device) -> float:
    """The host's clock once the device is done, in milliseconds."""
    synchronize(device)
    return time.perf_counter() * 1e3


def times_ms(function: Callable[[], object], device: torch.device, warmup: int, steps: int) -> list[float]:
    """The time of each of `steps` calls after `warmup` others, each between two synchronisations."""
    for _ in range(warmup):
        function()
    times = []
    for _ in range(steps):
        started = now_ms(device)
        function()
        times.append(now_ms(device) - started)
    return times


def median_ms(function: Callable[[], object], device: torch.device, warmup_ms: int = 25, rep_ms: int = 100) -> float:
    """The median time of a call in milliseconds, over about `rep_ms` of calls after `warmup_ms` of warm-up.

    On a GPU by `triton.testing.do_bench`: events around each call, the L2 cache cleared before it.
    """
    if device.type == "cuda":
        from triton.testing import do_bench

        return float(do_bench(function, warmup=warmup_ms, rep=rep_ms, return_mode="median"))
    (first,) = times_ms(function, device, warmup=0, steps=1)
    calls = max(3, min(100, int(rep_ms / max(first, 1e-3))))
    return statistics.median(times_ms(function, device, warmup=0, steps=calls))


def peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """The most CUDA memory that tensors held while `function` ran, in bytes."""
    torch.cuda.reset_peak_memory_stats(device)
    function()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)


def extra_bytes(function: Callable[[], object], device: torch.device) -> int:
    """The most CUDA memory that tensors held while `function` ran, less what they held before, in bytes."""
    before = torch.cuda.memory_allocated(device)
    return peak_bytes(function, device) - before


def or_out_of_memory(function: Callable[[], Row]) -> Row:
    """The row that `function` measures, or {"status": "out of memory"}; what it had allocated is freed."""
    try:
        return function()
    except torch.OutOfMemoryError:
        return {"status": OUT_OF_MEMORY}
    finally:
        if torch.cuda.is_available():
            gc.collect()
            torch.cuda.empty_cache()


def guarded(function: Callable[[], Row]) -> Row:
    """The row that `function` measures with its "status", which is not "ok" if memory or a kernel is missing.

    The reason of an "unsupported" row is its error's first line, or what PyTorch warned of before it.
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
                if "CUDA error" in str(error):  # the device is lost: no later row would mean anything
                    raise
                return {"status": UNSUPPORTED, "reason": _reason(error, [str(one.message) for one in caught])}

    return or_out_of_memory(attempt)


def _reason(error: Exception, warned: list[str]) -> str:
    lines = [text.splitlines()[0].split(" (Triggered")[0] for text in warned if text]
    why = [line for line in lines if not line.endswith("because:") and "runtime disabled" not in line]
    if "o available kernel" in str(error) and why:  # PyTorch has warned of what each kernel lacks
        return why[0]
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def grid(**axes: Sequence[object]) -> list[Row]:
    """A row for each combination of the axes' values; the last axis changes fastest."""
    return [dict(zip(axes, values)) for values in product(*axes.values())]


def run_grid(cases: list[Row], measure: Callable[[Row], Row], file: "ResultFile") -> list[Row]:
    """Measure every case: its row is the case, what `measure` returns, and the status (see `guarded`).

    All rows so far are written after each, so that an interrupted grid keeps them.
    """
    if not cases:
        raise ValueError("there is nothing to measure: an option that takes several values got none")
    rows: list[Row] = []
    with progress(len(cases)) as start:
        for case in cases:
            start(" ".join(str(value) for value in case.values() if not isinstance(value, float)))
            rows.append(case | guarded(lambda case=case: measure(case)))  # type: ignore[misc]
            file.write(rows)
    return rows


@contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """A progress bar, if somebody looks at it: call what you get with the name of what begins."""
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


def show(
    title: str,
    rows: list[Row],
    columns: Sequence[str] | None = None,
    *,
    settings: Sequence[str] = (),
    common: Row | None = None,
    digits: int = 3,
) -> None:
    """Print rows as a table, and below it why rows are missing.

    Args:
        title: a line above it.
        rows: cells that are lists are left out; so is the status if all rows are "ok".
        columns: keys to show, in this order. Default: all, in the order in which they first appear.
        settings: columns that move into the title if they have one value in all rows.
        common: what else to say in the title.
        digits: significant digits of numbers that are no integers.
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
        # Where space is short, the headers of numbers take two lines, and no word is cut off.
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
    exponent = int(f"{value:.{digits - 1}e}".partition("e")[2])  # of the rounded number
    if exponent < -4:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{max(0, digits - 1 - exponent)}f}"


class ResultFile:
    """A file of rows and of where they come from: what, command, device, versions, commit, date.

    Args:
        folder, name: the file is <folder>/<name>.json.
        what: what is measured.
        device: where.
        extra: more to say about it.
    """

    def __init__(self, folder: Path, name: str, what: str, device: torch.device, **extra: Any) -> None:
        self.path = folder / f"{name}.json"
        self.head = {"what": what, **environment(device), **extra}

    def write(self, rows: list[Row], **extra: Any) -> None:
        """Write the file anew."""
        write_atomically(self.path, json.dumps({**self.head, **extra, "rows": rows}, indent=1) + "\n")

    def announce(self) -> None:
        """Say where the file is."""
        print(f"written: {self.path}")


def write_result(folder: Path, name: str, what: str, rows: list[Row], device: torch.device, **extra: Any) -> Path:
    """Write `rows`, and where they come from, to `<folder>/<name>.json`, and say so."""
    file = ResultFile(folder, name, what, device, **extra)
    file.write(rows)
    file.announce()
    return file.path
