"""How long an all-reduce takes: the course's distributed_communication_single_node.

Two bandwidths are made of the time t for S bytes on each of n processes, as in NVIDIA's nccl-tests. S/t is what a
caller sees. A ring lets each process send 2 (n - 1)/n S bytes; this over t is the "bus" bandwidth, which can be
compared with that of a link, whatever n is.
"""

import statistics
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist

from cs336_systems.accounting import GB, MB, ring_bytes
from cs336_systems.measure import UNSUPPORTED, Measurement, ResultFile, Row, check_options, gpu_or_cpu, now_ms, show
from cs336_systems.parallel.process_group import Process, device_of_process, run_processes
from cs336_systems.parallel_step import gathered, run_cases

#: gloo: tensors of the CPU. nccl: of GPUs, one for each process.
LinkBackend = Literal["gloo", "nccl"]
#: How often an all-reduce is timed, at least and at most.
FEWEST, MOST = 3, 200
FLOAT32 = 4


@dataclass(frozen=True)
class BenchAllreduce(Measurement):
    """Time the all-reduce of float32 tensors over sizes, numbers of processes and backends."""

    backends: tuple[LinkBackend, ...] = ()
    """gloo: tensors of the CPU. nccl: of GPUs, one a process. Default: gloo, and with GPUs also nccl."""
    processes: tuple[int, ...] = (2, 4, 6)
    """Numbers of processes."""
    sizes_mb: tuple[float, ...] = gpu_or_cpu((1, 10, 100, 1000), (1, 10, 100))
    """Sizes of the tensor in each process, in MB of 10^6 bytes."""
    warmup: int = 2
    """All-reduces of each size before the clock starts."""
    rep_ms: int = 1000
    """About how long each size is timed, in ms; 3 all-reduces at least."""
    timeout_s: float = 600.0
    """A set of processes that is not done by then is ended."""
    name: str = "bench_allreduce"

    def execute(self) -> None:
        check_options(self, "processes", "warmup", "rep_ms", "timeout_s")
        for size in self.sizes_mb:
            if size * MB < FLOAT32:
                raise ValueError(f"--sizes-mb is {size}, but must be at least {FLOAT32 / MB:g}, one number")
        if not (self.processes and self.sizes_mb):
            raise ValueError("there is nothing to measure: an option that takes several values got none")
        device = device_of_process(self.device, 0)
        gpus = torch.cuda.device_count() if device.type == "cuda" else 0
        file = self.result_file("all-reduce of float32 tensors", device)
        rows: list[Row] = []
        for backend in self.backends or (("gloo", "nccl") if gpus else ("gloo",)):
            for count in self.processes:
                cases = [{"backend": backend, "processes": count, "size_MB": size} for size in self.sizes_mb]
                if backend == "nccl" and count > gpus:
                    why = f"each of {count} processes needs a GPU, but there are {gpus}"
                    rows += [case | {"status": UNSUPPORTED, "reason": why} for case in cases]
                else:
                    rows += run_processes(
                        time_all_reduces, count, cases, self.warmup, self.rep_ms, file, rows,
                        backend=backend, device="cuda" if backend == "nccl" else "cpu", timeout_s=self.timeout_s,
                    )[0]  # fmt: skip
                file.write(rows)
        columns = ("backend", "processes", "size_MB", "ms", "times", "S/t_GB/s", "bus_GB/s")
        show("all-reduce of float32 tensors", rows, columns)
        file.announce()


def time_all_reduces(
    process: Process, cases: list[Row], warmup: int, rep_ms: int, file: ResultFile, before: list[Row]
) -> list[Row]:
    """The rows of one set of processes; all sizes are timed in it, since starting processes takes seconds.

    Args:
        process: the process that this is.
        cases: how the rows begin.
        warmup: all-reduces before the clock starts.
        rep_ms: about how long each size is timed.
        file: where rows are written.
        before: rows of other sets, which belong into the file too.
    """

    def measure(case: Row) -> Row:
        # Sums of zeros stay what they are, however often they are added up.
        tensor = torch.zeros(int(case["size_MB"] * MB) // FLOAT32, device=process.device)
        once = [_time_ms(tensor, process) for _ in range(max(1, warmup))][-1]
        repetitions = gathered(min(MOST, max(FEWEST, int(rep_ms / once))))[0]
        return {"times_ms": [_time_ms(tensor, process) for _ in range(repetitions)]}

    return run_cases(process, cases, measure, summarize, file, before)


def _time_ms(tensor: torch.Tensor, process: Process) -> float:
    """One all-reduce, begun at the same time everywhere, between two synchronisations."""
    dist.barrier()
    started = now_ms(process.device)
    dist.all_reduce(tensor)
    return now_ms(process.device) - started


def summarize(case: Row, of_processes: list[Row]) -> Row:
    """The rest of a row: times of the slowest process, and bandwidths in GB of 10^9 bytes per second."""
    slowest = max((row["times_ms"] for row in of_processes), key=statistics.median)
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
