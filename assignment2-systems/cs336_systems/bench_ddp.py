"""How long a training step takes under data parallelism, and how much of it is communication.

The course's naive_ddp_benchmarking, minimal_ddp_flat_benchmarking, ddp_overlap_individual_parameters_benchmarking and
ddp_bucketed_benchmarking. All variants run in one set of processes, in several rounds, so that all of them meet a
warm or a busy minute. The floor is the variant "none", in which processes do not talk: what a step takes longer than
there is communication that computation does not hide. Processes that exchange gradients also wait for each other, which
has a price where their steps vary; the floor for that is "none", each step as long as its slowest process (`paced`).
"""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, get_args

from cs336_basics.accounting import parameter_counts
from cs336_systems.accounting import FP32, MB, ring_bytes
from cs336_systems.measure import OK, ResultFile, Row, check_options, gpu_or_cpu, show
from cs336_systems.models import model_config
from cs336_systems.overlap import TRACED_STEPS, StepTimeline, overlap_row, plot_timelines, record_step, step_timeline
from cs336_systems.parallel.process_group import Process
from cs336_systems.parallel_step import (
    NO_MEMORY_ON_CPU,
    AdamWName,
    BucketSize,
    ParallelConfig,
    ParallelMeasurement,
    ParallelStep,
    StepTimes,
    clear_memory_statistics,
    everywhere,
    largest,
    peak_gb,
    progress_of,
    summary,
)
from cs336_systems.training_step import Mode, StepConfig

#: none: no communication. bucketed, torch-ddp: once for each size of a bucket.
DdpVariant = Literal["none", "naive", "flat", "overlapped", "bucketed", "torch-ddp"]

#: Columns of the second and the third table.
PARTS = ("forward_backward_ms", "after_backward_ms", "optimizer_ms")
OVERLAP = ("compute_ms", "communication_ms", "in_backward_%", "hidden_%")


@dataclass(frozen=True)
class BenchDdp(ParallelMeasurement):
    """Time a training step in several processes for each way to average gradients; show what overlaps."""

    variants: tuple[DdpVariant, ...] = get_args(DdpVariant)
    """none: no communication, the floor. naive, flat: after the backward pass. overlapped, bucketed: during it.
    torch-ddp: PyTorch's container."""
    bucket_mb: tuple[BucketSize, ...] = gpu_or_cpu(("auto", 1, 10, 100, 1000), ("auto", 0.1, 1))
    """Sizes of a bucket of the bucketed variant, in MB of 2^20 bytes; auto is its default, buckets that shrink."""
    torch_bucket_mb: tuple[float, ...] = gpu_or_cpu((25, 100, 1000), (25,))
    """The same of torch-ddp, whose default is 25."""
    mode: Mode = "eager"
    """compiled puts each block of the model through torch.compile."""
    optimizer: AdamWName = "basics"
    """Assignment 1's AdamW, the fused one, or PyTorch's."""
    rounds: int = gpu_or_cpu(2, 3)
    """Rounds, in each of which every variant is timed once, with a new model."""
    trace: bool = False
    """Also profile one step of each variant: shares of hidden communication, and a picture, <out>/<name>.png."""
    keep_traces: bool = False
    """Leave the traces that --trace makes of them: <out>/<name>_<variant>.trace.json.gz."""
    name: str = "bench_ddp"

    def execute(self) -> None:
        device = self.checked_device()
        check_options(self, "rounds")
        for size in (*self.bucket_mb, *self.torch_bucket_mb):
            if size != "auto" and size <= 0:
                raise ValueError(f"a bucket of {size} MB was asked for; choose a positive size")
        config = self.step_config(device, self.mode, self.optimizer)
        cases = self.cases()
        if not cases:
            raise ValueError("there is nothing to measure: an option that takes several values got none")
        settings = self.settings() | {"mode": self.mode, "optimizer": self.optimizer, "rounds": self.rounds}
        what = "training step under data parallelism"
        file = self.result_file(what, device, **settings)
        rows = self.start(measure_ddp, device, self, config, cases, file)
        for title, columns in (
            (what, ("step_ms", "std_ms", "drift_%", "exposed_ms", "exposed_%", "paced_ms", "beyond_paced_%", "tok/s")),
            ("its parts, bytes sent (predicted), memory", (*PARTS, "sent_MB", "peak_GB")),
            ("one profiled step of process 0", OVERLAP if self.trace else ()),
        ):
            if columns:
                show(title, rows, ("variant", "bucket_MB", *columns), common=settings if title == what else None)
        if device.type == "cpu":
            print(NO_MEMORY_ON_CPU)
        file.announce()
        if self.trace:
            print(f"written: {self.picture}")

    @property
    def picture(self) -> Path:
        """Where the picture of the profiled steps is written."""
        return self.out / f"{self.name}.png"

    def cases(self) -> list[Row]:
        """A row for each variant and size of a bucket."""
        sizes: dict[str, tuple[BucketSize, ...]] = {"bucketed": self.bucket_mb, "torch-ddp": self.torch_bucket_mb}
        return [
            {"variant": variant} | ({"bucket_MB": size} if size else {})
            for variant in self.variants
            for size in sizes.get(variant, (None,))
        ]


def measure_ddp(
    process: Process, options: BenchDdp, config: StepConfig, cases: list[Row], file: ResultFile
) -> list[Row]:
    """The rows, measured in all processes; process 0 writes the file after each variant of each round."""
    rows: list[Row] = [case | {"status": OK} for case in cases]
    times: list[list[list[StepTimes]]] = [[] for _ in rows]  # [row][round or none][process] -> of all steps
    rounds: list[list[float]] = [[] for _ in rows]
    configs = [
        ParallelConfig(config, case["variant"], case.get("bucket_MB", "auto"), options.optimizer) for case in cases
    ]
    with progress_of(process, (options.rounds + options.trace) * len(rows)) as start:
        for number in range(1, options.rounds + 1):
            for index, row in enumerate(rows):
                start(f"round {number}: {label(row)}")
                if row["status"] != OK:
                    continue
                status, measured = everywhere(partial(time_steps, configs[index], process, options))
                row |= status
                if not measured:
                    continue
                of_round = [one["times"] for one in measured]
                times[index] = [a + b for a, b in zip(times[index], of_round)] if times[index] else of_round
                rounds[index].append(summary(of_round)["step_ms"])
                row |= summary(times[index]) | largest([row, *measured], "peak_GB")
                row |= _derived(options, row, rounds[index])
                _compare_with_floor(rows)
                if process.rank == 0:
                    file.write(rows)
        if options.trace:
            timelines: dict[str, StepTimeline] = {}
            for index, row in enumerate(rows):
                start(f"profile: {label(row)}")
                if row["status"] == OK:
                    status, measured = everywhere(partial(trace_step, configs[index], process, options, row, timelines))
                    row |= status | (measured[0]["overlap"] if measured else {})
            if process.rank == 0:
                file.write(rows)
                model = (
                    f"{options.size}, {options.processes} processes, {options.batch_size} x {options.context} tokens"
                )
                plot_timelines(timelines, options.picture, f"one training step of process 0: {model} each")
    return rows


def time_steps(config: ParallelConfig, process: Process, options: BenchDdp) -> Row:
    """The times of all steps of one round in this process, and the peak of memory."""
    step = ParallelStep(config, process)
    for _ in range(options.warmup):
        step.run()
    clear_memory_statistics(process.device)
    times = [step.timed() for _ in range(options.steps)]
    return {"times": times, "peak_GB": peak_gb(process.device)}


def trace_step(
    config: ParallelConfig, process: Process, options: BenchDdp, row: Row, timelines: dict[str, StepTimeline]
) -> Row:
    """What overlaps in a step of process 0, which is profiled; its timeline joins `timelines`."""
    step = ParallelStep(config, process)
    for _ in range(max(1, options.warmup)):
        step.run()
    if process.rank:
        for _ in range(TRACED_STEPS):
            step.run()
        return {}
    keep = options.out / f"{options.name}_{label(row).replace(' ', '_')}.trace.json.gz" if options.keep_traces else None
    timeline = step_timeline(record_step(step.run, process.device, keep))
    timelines[label(row)] = timeline
    return {"overlap": overlap_row(timeline)}


def label(row: Mapping[str, object]) -> str:
    """A row's variant, and the size of its buckets."""
    size = row.get("bucket_MB")
    if size is None:
        return str(row["variant"])
    return f"{row['variant']} {size if size == 'auto' else f'{size:g} MB'}"


def _derived(options: BenchDdp, row: Row, rounds: list[float]) -> Row:
    """What follows from the times: bytes sent are predicted, for a ring and float32 gradients."""
    gradients = FP32 * sum(parameter_counts(model_config(options.size, options.context)).values())
    sent = 0.0 if row["variant"] == "none" else ring_bytes(gradients, options.processes)
    return {
        "drift_%": 100 * (max(rounds) - min(rounds)) / statistics.median(rounds),
        "sent_MB": sent / MB,
        "tok/s": options.tokens_per_second(row["step_ms"]),
        "round_ms": list(rounds),
    }


def _compare_with_floor(rows: list[Row]) -> None:
    """Exposed communication: what a step takes longer than one without any."""
    floor = next((row for row in rows if row["variant"] == "none" and "step_ms" in row), None)
    for row in rows:
        if floor is not None and "step_ms" in row and row["variant"] != "none":
            row["exposed_ms"] = row["step_ms"] - floor["step_ms"]
            row["exposed_%"] = 100 * row["exposed_ms"] / row["step_ms"]
            row["beyond_paced_%"] = 100 * (row["paced_ms"] / floor["paced_ms"] - 1)
