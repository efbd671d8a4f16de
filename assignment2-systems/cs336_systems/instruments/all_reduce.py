"""Time all-reduces: the course's distributed_communication_single_node.

The time t for S bytes on each of n ranks gives two bandwidths, as in NVIDIA's nccl-tests. S/t is what a caller sees.
In a ring each rank sends 2 (n - 1)/n S bytes; this over t is the "bus" bandwidth, which can be compared with that of a
link for any n.
"""

import statistics

import torch
import torch.distributed as dist

from cs336_systems.instruments.measure import (
    UNSUPPORTED,
    ResultFile,
    Row,
    cartesian,
    check_cases,
    now_ms,
    print_table,
    result_file,
)
from cs336_systems.instruments.options.common import check_options
from cs336_systems.instruments.options.many_gpus import BenchAllreduce
from cs336_systems.instruments.ranks import run_cases
from cs336_systems.parallel.collectives import all_gather_objects
from cs336_systems.parallel.process_group import Rank, device_of_rank, run_on_ranks
from cs336_systems.theory.collectives import ring_bytes
from cs336_systems.theory.units import FLOAT32, GB, MB

#: How often an all-reduce is timed, at least and at most.
MIN_REPETITIONS, MAX_REPETITIONS = 3, 200


def run(options: BenchAllreduce) -> None:
    """Measure, print a table and write a file."""
    check_options(options, "processes", "warmup", "rep_ms", "timeout_s")
    for size in options.sizes_mb:
        if size * MB < FLOAT32:
            raise ValueError(f"--sizes-mb is {size}, but must be at least {FLOAT32 / MB:g}, one number")
    check_cases(cartesian(processes=options.processes, size=options.sizes_mb))
    device = device_of_rank(options.device, 0)
    gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    file = result_file(options, "all-reduce of float32 tensors", device)
    rows: list[Row] = []
    for backend in options.backends or (("gloo", "nccl") if gpus else ("gloo",)):
        for count in options.processes:
            cases = [{"backend": backend, "processes": count, "size_MB": size} for size in options.sizes_mb]
            if backend == "nccl" and count > gpus:
                why = f"each of {count} ranks needs a GPU, but there are {gpus}"
                rows += [case | {"status": UNSUPPORTED, "reason": why} for case in cases]
            else:
                rows += run_on_ranks(
                    time_all_reduces, count, cases, options.warmup, options.rep_ms, file, rows,
                    backend=backend, device="cuda" if backend == "nccl" else "cpu", timeout_s=options.timeout_s,
                )[0]  # fmt: skip
            file.write(rows)
    columns = ("backend", "processes", "size_MB", "ms", "times", "S/t_GB/s", "bus_GB/s")
    print_table("all-reduce of float32 tensors", rows, columns)
    file.announce()


def time_all_reduces(
    rank: Rank, cases: list[Row], warmup: int, rep_ms: int, file: ResultFile, before: list[Row]
) -> list[Row]:
    """Time all sizes on one set of ranks, since starting ranks takes seconds.

    Args:
        rank: this rank.
        cases: the beginnings of the rows.
        warmup: all-reduces before the clock starts.
        rep_ms: about how long each size is timed.
        file: where rows are written.
        before: rows of other sets, which belong in the file too.
    """

    def measure(case: Row) -> Row:
        # Sums of zeros stay what they are, however often they are added up.
        tensor = torch.zeros(int(case["size_MB"] * MB) // FLOAT32, device=rank.device)
        once = [_time_ms(tensor, rank) for _ in range(max(1, warmup))][-1]
        repetitions = all_gather_objects(min(MAX_REPETITIONS, max(MIN_REPETITIONS, int(rep_ms / once))))[0]
        return {"times_ms": [_time_ms(tensor, rank) for _ in range(repetitions)]}

    return run_cases(rank, cases, measure, summarize, file, before)


def _time_ms(tensor: torch.Tensor, rank: Rank) -> float:
    """Time one all-reduce, started at the same time on all ranks, between two synchronizations."""
    dist.barrier()
    started = now_ms(rank.device)
    dist.all_reduce(tensor)
    return now_ms(rank.device) - started


def summarize(case: Row, of_ranks: list[Row]) -> Row:
    """Make the rest of a row: times of the slowest rank, and bandwidths in GB/s."""
    slowest = max((row["times_ms"] for row in of_ranks), key=statistics.median)
    ms = statistics.median(slowest)
    size = case["size_MB"] * MB
    per_second = 1e3 / ms / GB
    return {
        "ms": ms,
        "min_ms": min(slowest),
        "max_ms": max(slowest),
        "times": len(slowest),
        "S/t_GB/s": size * per_second,
        "bus_GB/s": ring_bytes(size, case["processes"]) * per_second,
    }
