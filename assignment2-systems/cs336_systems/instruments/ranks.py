"""Measuring training steps on several ranks at once: timers, memory counters, and grids of cases.

The commands that measure data parallelism share this. They start one set of ranks, which runs all cases one after the
other, each with a new model, so that nothing of a case is left when the next one begins.
"""

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cs336_systems.instruments.measure import OK, ResultFile, Row, now_ms, progress, try_measure
from cs336_systems.instruments.options.common import RanksMeasurement, check_options
from cs336_systems.parallel.collectives import all_gather_objects
from cs336_systems.parallel.process_group import Rank, check_gpus, device_of_rank, run_on_ranks
from cs336_systems.theory.units import GB
from cs336_systems.training.choices import Mode, OptimizerName, model_config
from cs336_systems.training.step import StepConfig, TrainingStep


class StepTimes(NamedTuple):
    """Milliseconds of one step on one rank."""

    step: float
    """By the host's clock, from an idle device to an idle device."""
    forward_backward: float
    """This and the next two are measured, on a GPU, between events of the stream that computes."""
    after_backward: float
    """From the end of the backward pass until the gradients are averaged. (PyTorch's containers wait for them inside
    the backward pass.)"""
    optimizer: float


def time_step(step: TrainingStep) -> StepTimes:
    """Run one training step and time it."""
    marks = Marks(step.device)
    started = now_ms(step.device)
    marks.mark()
    step.full(marks.mark)
    return StepTimes(now_ms(step.device) - started, *marks.between_ms())


class Marks:
    """Moments on the device's own clock, recorded without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[Any] = []

    def mark(self) -> None:
        """Record the moment at which the device reaches this point."""
        if not self._on_gpu:
            self._marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)

    def between_ms(self) -> list[float]:
        """Return the milliseconds between one mark and the next, once the device has passed them all."""
        pairs = zip(self._marks, self._marks[1:])
        return [a.elapsed_time(b) if self._on_gpu else (b - a) * 1e3 for a, b in pairs]


def optimizer_state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of the tensors that an optimizer keeps on this rank, which may be a share of its state."""
    inner = getattr(optimizer, "inner", None) or getattr(optimizer, "optim", None) or optimizer
    return sum(x.nbytes for state in inner.state.values() for x in state.values() if isinstance(x, Tensor))


def measure_on_all_ranks(measure: Callable[[], Row]) -> tuple[Row, list[Row]]:
    """Measure on all ranks, and free what that leaves behind.

    Returns:
        The status, with a reason if it is not "ok", and what the ranks measured, by rank; nothing if one of them
        failed. Usually all ranks fail together: a rank that fails alone leaves the others waiting until the timeout.
    """
    mine = try_measure(measure)
    gc.collect()  # models in containers refer to themselves
    rows = all_gather_objects(mine)
    failed = next((row for row in rows if row["status"] != OK), None)
    return (failed, []) if failed else ({"status": OK}, rows)


def run_cases(
    rank: Rank,
    cases: list[Row],
    measure: Callable[[Row], Row],
    summarize: Callable[[Row, list[Row]], Row],
    file: ResultFile,
    before: Sequence[Row] = (),
) -> list[Row]:
    """Measure every case on all ranks, as `run_grid` does in one process; rank 0 writes the file.

    Args:
        rank: this rank.
        cases: the beginnings of the rows.
        measure: measures a case on one rank.
        summarize: makes the rest of a row from the case and what each rank measured.
        file: where the rows are written.
        before: rows that are in the file already.
    """
    rows: list[Row] = []
    with progress_on_rank_0(rank, len(cases)) as start:
        for case in cases:
            start(" ".join(str(value) for value in case.values()))
            status, measured = measure_on_all_ranks(partial(measure, case))
            rows.append(case | status | (summarize(case, measured) if measured else {}))
            if rank.rank == 0:
                file.write([*before, *rows])
    return rows


def progress_on_rank_0(rank: Rank, total: int) -> AbstractContextManager[Callable[[str], None]]:
    """Show `progress` on rank 0 only."""
    return progress(total) if rank.rank == 0 else nullcontext(lambda what: None)


def summary(times: Sequence[Sequence[StepTimes]]) -> Row:
    """Summarize the times of all steps on all ranks by those of the slowest rank.

    `paced_ms` takes the slowest rank of every single step instead. Ranks that wait for each other at every step, but
    exchange nothing, would take this long; on a host where steps vary, it is longer than the time of any one rank.

    Args:
        times: [rank][step].
    """
    slowest = max(times, key=lambda steps: statistics.median(step.step for step in steps))
    whole = [step.step for step in slowest]
    medians = StepTimes(*(statistics.median(column) for column in zip(*slowest)))
    return {
        "step_ms": medians.step,
        "paced_ms": statistics.median(max(step.step for step in of_step) for of_step in zip(*times)),
        "mean_ms": statistics.fmean(whole),
        "std_ms": statistics.stdev(whole) if len(whole) > 1 else 0.0,
        "forward_backward_ms": medians.forward_backward,
        "after_backward_ms": medians.after_backward,
        "optimizer_ms": medians.optimizer,
    }


def clear_memory_statistics(device: torch.device) -> None:
    """Reset the peak, and free the workspaces that cuBLAS holds from earlier cases."""
    if device.type == "cuda":
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.reset_peak_memory_stats(device)


def peak_gb(device: torch.device) -> float | None:
    """Return the most memory that tensors held since `clear_memory_statistics`, in GB; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) / GB if device.type == "cuda" else None


def held_gb(device: torch.device) -> float | None:
    """Return the memory that tensors hold now, in GB; None on a CPU."""
    return torch.cuda.memory_allocated(device) / GB if device.type == "cuda" else None


def largest(rows: Sequence[Row], key: str) -> Row:
    """Return {key: the largest value among the ranks}, or nothing if it was not measured."""
    values = [row[key] for row in rows if row.get(key) is not None]
    return {key: max(values)} if values else {}


#: Printed where memory columns are missing.
NO_MEMORY_ON_CPU = "On a CPU, peaks of memory are not measured."


def checked_device(options: RanksMeasurement) -> torch.device:
    """Check the numbers among the options, and return the device.

    Raises:
        ValueError: a number is out of range, or there are more ranks than GPUs.
    """
    check_options(options, "processes", "context", "batch_size", "steps", "timeout_s")
    check_options(options, "warmup", least=0)
    check_gpus(options.processes, options.device)
    return device_of_rank(options.device, 0)


def step_config(
    options: RanksMeasurement, device: torch.device, mode: Mode = "eager", optimizer: OptimizerName = "basics"
) -> StepConfig:
    """Return the step of one rank; raise a ValueError if the device cannot run it."""
    shape = model_config(options.size, options.context)
    return StepConfig(shape, device, options.batch_size, options.attention, options.precision, mode, optimizer)


def shared_settings(options: RanksMeasurement) -> Row:
    """Return what all rows have in common."""
    names = ("processes", "size", "context", "batch_size", "attention", "precision", "steps")
    return {name: getattr(options, name) for name in names}


def tokens_per_second(options: RanksMeasurement, step_ms: float) -> float:
    """Return the tokens per second of all ranks together."""
    return options.processes * options.batch_size * options.context / step_ms * 1e3


def start_ranks(
    options: RanksMeasurement, function: Callable[..., list[Row]], device: torch.device, *args: Any
) -> list[Row]:
    """Run `function(rank, *args)` on new ranks, and return the rows of rank 0."""
    return run_on_ranks(function, options.processes, *args, device=device.type, timeout_s=options.timeout_s)[0]
