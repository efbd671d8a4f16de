"""Measure how training scales from one GPU to all GPUs of a machine, in one command that can be resumed.

Its parts, each for several numbers of ranks:

    all-reduce       bus bandwidth against the size of a message
    weak, strong     a training step with a fixed batch per rank, or a fixed batch for all ranks together: no
                     communication, our bucketed DDP and FSDP, PyTorch's
    optimizer-state  the AdamW state that a rank holds, and the formula
    8B               the training step of the 2026 leaderboard

A set is one part with one number of ranks (and for 8B one contestant). Its rows are written when it is finished. A set
that is in the file already is not measured again, so that an interrupted command continues where it was.
"""

import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch

from cs336_basics.accounting import parameter_counts
from cs336_systems.instruments import ranks
from cs336_systems.instruments.all_reduce import time_all_reduces
from cs336_systems.instruments.leaderboard_2026 import leaderboard_rows
from cs336_systems.instruments.measure import OK, ResultFile, Row, print_table, result_file
from cs336_systems.instruments.options.common import RanksMeasurement, check_options
from cs336_systems.instruments.options.many_gpus import Leaderboard2026, Scaling, ScalingPart
from cs336_systems.instruments.sharding import measure_memory_and_time
from cs336_systems.parallel.process_group import Rank, check_gpus, device_of_rank, run_on_ranks
from cs336_systems.theory.state import STATE, training_bytes_per_rank
from cs336_systems.theory.units import GB, MB
from cs336_systems.training.choices import model_config
from cs336_systems.training.step import StepConfig

#: The keys of a row that name its set.
SET = ("part", "processes", "contestant")
#: The origin of a row, since sets may be measured on different days.
ORIGIN = ("date", "commit", "torch")
MEMORY = ("peak_GB", "held_GB")
LABELS = {
    "bucketed": "our DDP", "torch-ddp": "PyTorch's DDP", "fsdp": "our FSDP", "fully-shard": "PyTorch's FSDP2",
}  # fmt: skip
#: The name of a mode in older files of results -> its name now.
OLD_MODES = {"compiled": "compiled-blocks"}


def run(options: Scaling) -> None:
    """Measure the sets that the file lacks, print tables and draw a picture."""
    check_options(options, "processes", "context", "weak_batch", "strong_batch", "steps", "minutes")
    device = device_of_rank(options.device, 0)
    check_gpus(max((*options.processes, *options.all_reduce_processes), default=0), device.type)
    if odd := [count for count in options.processes if options.strong_batch % count]:
        raise ValueError(
            f"--strong-batch {options.strong_batch} does not split over {odd[0]} ranks; choose a multiple of {odd[0]}"
        )
    names = ("size", "context", "weak_batch", "strong_batch", "mode", "optimizer", "warmup", "steps")
    settings = {name: getattr(options, name) for name in names}
    settings |= {"variants": list(options.variants), "sizes_mb": list(options.sizes_mb)}
    file = result_file(options, "scaling over the GPUs of a machine", device, **settings)
    rows = measured_before(file, settings)
    left = measure(options, device, rows, file)
    print_tables(rows)
    picture = options.out / f"{options.name}.png"
    plot(rows, picture)
    file.announce()
    print(f"written: {picture}")
    if left:
        print(
            f"not measured within {options.minutes:g} minutes: {', '.join(left)}; run the same command again to "
            "continue (with more --minutes if it makes no progress)"
        )


def measure(options: Scaling, device: torch.device, rows: list[Row], file: ResultFile) -> list[str]:
    """Measure the sets that `rows` lacks, and add them; return the sets for which there was not enough time."""
    deadline = time.monotonic() + 60 * options.minutes
    longest: dict[str, float] = {}  # seconds of a set, by part
    left = []
    for a_set in sets_to_measure(options):
        if any(all(row.get(key) == a_set.get(key) for key in SET) for row in rows):
            continue
        what = " ".join(str(value) for value in a_set.values())
        seconds = deadline - time.monotonic()
        if seconds < longest.get(a_set["part"], 0.0) or seconds <= 0:
            left.append(what)
            continue
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as scratch:  # for rows of a set that is not finished yet
            try:
                new = measure_set(options, a_set, device, seconds, ResultFile(Path(scratch), "set", "", device))
            except TimeoutError:
                left.append(what)
                continue
        longest[a_set["part"]] = max(longest.get(a_set["part"], 0.0), time.monotonic() - began)
        rows += [a_set | row | {key: file.head[key] for key in ORIGIN} for row in new]
        _compare(rows)
        file.write(rows)
        print(f"{what}: {time.monotonic() - began:.0f} s", flush=True)
    return left


def sets_to_measure(options: Scaling) -> Iterator[Row]:
    """Yield the sets to measure, as the beginnings of rows."""
    gpus = torch.cuda.device_count()
    for part in options.parts:
        counts = options.processes if part in ("weak", "strong") else [n for n in options.processes if n > 1]
        if part == "all-reduce":
            counts = options.all_reduce_processes or sorted({*counts, *([6] if gpus >= 6 else [])})
        for count in counts:
            a_set = {"part": part, "processes": count}
            if part in ("weak", "strong") and count == 1 and "none" not in options.variants:
                continue
            yield from [a_set | {"contestant": who} for who in options.contestants] if part == "8B" else [a_set]


def measure_set(options: Scaling, a_set: Row, device: torch.device, seconds: float, file: ResultFile) -> list[Row]:
    """Measure the rows of a set.

    Raises:
        TimeoutError: the set took longer than `seconds`.
    """
    part, count = a_set["part"], a_set["processes"]
    if part == "8B":
        step = Leaderboard2026(
            device=options.device, processes=count, contestants=(a_set["contestant"],), warmup=1, steps=2,
            timeout_s=seconds,
        )  # fmt: skip
        return leaderboard_rows(step, device, file)
    start = partial(run_on_ranks, device=device.type, timeout_s=seconds)
    if part == "all-reduce":
        backend = "nccl" if device.type == "cuda" else "gloo"
        cases = [{"backend": backend, "processes": count, "size_MB": size} for size in options.sizes_mb]
        return start(time_all_reduces, count, cases, 2, 1000, file, [])[0]
    batch = options.strong_batch // count if part == "strong" else options.weak_batch
    step_options = RanksMeasurement(
        device=options.device, processes=count, size=options.size, context=options.context, batch_size=batch,
        attention="flash" if device.type == "cuda" else "plain", warmup=options.warmup, steps=options.steps,
    )  # fmt: skip
    config = ranks.step_config(step_options, device, options.mode, options.optimizer)
    if part == "optimizer-state":
        cases = [{"sharding": sharding} for sharding in ("none", "ours", "torch")]
    else:
        cases = [{"variant": variant} for variant in options.variants if count > 1 or variant == "none"]
    return start(measure_steps, count, step_options, config, cases, file)[0]


def print_tables(rows: list[Row]) -> None:
    """Print a table for each part."""
    for part, columns in (
        ("all-reduce", ("processes", "size_MB", "ms", "bus_GB/s")),
        ("weak", ("processes", "variant", "step_ms", "tok/s", "efficiency_%", "exposed_%", *MEMORY)),
        ("strong", ("processes", "variant", "step_ms", "tok/s", "efficiency_%", "exposed_%", *MEMORY)),
        ("optimizer-state", ("processes", "sharding", "state_MB", "predicted_state_MB", *MEMORY)),
        ("8B", ("processes", "contestant", "seconds", "tokens/s", "of_matmul", "peak_GB")),
    ):
        if of_part := [row for row in rows if row["part"] == part]:
            print_table(part, of_part, columns)


def measured_before(file: ResultFile, settings: Row) -> list[Row]:
    """Read the rows that are in the file already.

    Raises:
        ValueError: they were measured on another device or with other settings.
    """
    if not file.path.exists():
        return []
    before: dict[str, Any] = json.loads(file.path.read_text(encoding="utf-8"))
    asked = settings | {"device": file.head["device"]}
    for key, value in asked.items():
        stored = before.get(key)
        if value not in (stored, OLD_MODES.get(str(stored))):
            raise ValueError(
                f"{file.path} has rows with {key} {stored}, not {value}; choose another --name, or delete the file"
            )
    return before["rows"]


def measure_steps(
    rank: Rank, options: RanksMeasurement, config: StepConfig, cases: list[Row], file: ResultFile
) -> list[Row]:
    """Measure rows of training steps on all ranks."""

    def measure(case: Row) -> Row:
        if "sharding" in case:
            one = replace(config, mode="eager", container="bucketed", sharding=case["sharding"])
        else:
            one = replace(config, container=case["variant"])
        return measure_memory_and_time(one, rank, options)

    return ranks.run_cases(rank, cases, measure, partial(_summary, options), file)


def _summary(options: RanksMeasurement, case: Row, of_ranks: list[Row]) -> Row:
    row = ranks.summary([one["times"] for one in of_ranks])
    row["tok/s"] = ranks.tokens_per_second(options, row["step_ms"])
    peaks = [
        {"peak_GB": max(one["before_step_GB"], one["during_step_GB"])}
        for one in of_ranks
        if one["during_step_GB"] is not None
    ]
    row |= ranks.largest(peaks, "peak_GB") | ranks.largest(of_ranks, "held_GB") | ranks.largest(of_ranks, "state_MB")
    if "sharding" in case:
        count = sum(parameter_counts(model_config(options.size, options.context)).values())
        sharers = options.processes if case["sharding"] != "none" else 1
        row["predicted_state_MB"] = STATE["float32"].optimizer * count / sharers / MB
        row["predicted_held_GB"] = training_bytes_per_rank(count, sharers, 1) / GB
    return row


def _compare(rows: list[Row]) -> None:
    """Add the efficiency against one rank, and the share of a step that communication takes."""
    for part in ("weak", "strong"):
        steps = [row for row in rows if row["part"] == part and row["status"] == OK]
        alone = next((row for row in steps if row["processes"] == 1), None)
        for row in steps:
            if alone:
                row["efficiency_%"] = 100 * row["tok/s"] / (row["processes"] * alone["tok/s"])
            floor = next((x for x in steps if x["processes"] == row["processes"] and x["variant"] == "none"), None)
            if floor and row is not floor:
                row["exposed_%"] = 100 * (row["step_ms"] - floor["step_ms"]) / row["step_ms"]


def plot(rows: list[Row], destination: Path) -> None:
    """Draw bandwidth, both kinds of scaling, and the optimizer's state as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6.4), layout="constrained")
    (bandwidth, state), (weak, strong) = figure.subplots(2, 2)
    rows = sorted((row for row in rows if row["status"] == OK), key=lambda row: row["processes"])
    of = {part: [row for row in rows if row["part"] == part] for part in get_args(ScalingPart)}
    for count in dict.fromkeys(row["processes"] for row in of["all-reduce"]):
        line = [row for row in of["all-reduce"] if row["processes"] == count]
        bandwidth.loglog(
            [row["size_MB"] for row in line], [row["bus_GB/s"] for row in line], marker="o", label=f"{count} ranks"
        )
    bandwidth.set(title="all-reduce", xlabel="message (MB)", ylabel="bus bandwidth (GB/s)")
    for sharding, label in (("none", "not sharded"), ("ours", "ours"), ("torch", "ZeroRedundancyOptimizer")):
        line = [row for row in of["optimizer-state"] if row["sharding"] == sharding]
        counts = [row["processes"] for row in line]
        state.plot(counts, [row["state_MB"] / 1e3 for row in line], "o", label=label)
        state.plot(counts, [row["predicted_state_MB"] / 1e3 for row in line], ":", color="#777777")
    state.set(title="AdamW's state (dotted: the formula)", xlabel="ranks", ylabel="GB per rank")
    for axes, part in ((weak, "weak"), (strong, "strong")):
        for variant, label in LABELS.items():
            line = [row for row in of[part] if row["variant"] == variant or row["processes"] == 1]
            axes.plot([row["processes"] for row in line], [row["tok/s"] for row in line], marker="o", label=label)
        if alone := next((row for row in of[part] if row["processes"] == 1), None):
            counts = sorted({row["processes"] for row in of[part]})
            axes.plot(counts, [alone["tok/s"] * count for count in counts], ":", color="#777777", label="ideal")
        axes.set(title=f"{part} scaling", xlabel="ranks", ylabel="tokens/s")
    for axes in (state, weak, strong):
        axes.set_xticks(sorted({row["processes"] for row in rows}))
    for axes in (bandwidth, state, weak, strong):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    destination.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(destination, dpi=130)
