"""How training scales from one GPU to all of a machine, in one resumable command.

Parts, each for several numbers of processes:

    all-reduce       bus bandwidth against the size of a message
    weak, strong     a training step with a fixed batch per process, or a fixed batch for all of them together: no
                     communication, our bucketed DDP and FSDP, PyTorch's
    optimizer-state  what of AdamW's state a process holds, and the formula
    8B               the training step of the 2026 leaderboard

A set is one part with one number of processes (and for 8B one contestant). Its rows are written when it is done; a set
that is in the file is not measured again, so that an interrupted command goes on where it was.
"""

import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from cs336_basics.accounting import parameter_counts
from cs336_systems.accounting import GB, MB, STATE, training_bytes_per_rank
from cs336_systems.bench_allreduce import time_all_reduces
from cs336_systems.bench_sharding import measure_memory_and_time
from cs336_systems.leaderboard_2026 import Contestant, Leaderboard2026, leaderboard_rows
from cs336_systems.measure import OK, Measurement, ResultFile, Row, check_options, gpu_or_cpu, show
from cs336_systems.models import SizeName, model_config
from cs336_systems.parallel.process_group import Process, check_gpus, device_of_process, run_processes
from cs336_systems.parallel_step import (
    AdamWName,
    ParallelConfig,
    ParallelMeasurement,
    largest,
    run_cases,
    summary,
)
from cs336_systems.training_step import Mode, StepConfig

Part = Literal["all-reduce", "weak", "strong", "optimizer-state", "8B"]
Variant = Literal["none", "bucketed", "torch-ddp", "fsdp", "fully-shard"]
#: What a row is of.
SET = ("part", "processes", "contestant")
#: Where a row comes from, since sets may be measured on different days.
ORIGIN = ("date", "commit", "torch")
MEMORY = ("peak_GB", "held_GB")
LABELS = {
    "bucketed": "our DDP", "torch-ddp": "PyTorch's DDP", "fsdp": "our FSDP", "fully-shard": "PyTorch's FSDP2",
}  # fmt: skip


def _up_to_all_gpus() -> tuple[int, ...]:
    """1, 2, 4, … as far as there are GPUs; 1 and 2 processes without."""
    count = torch.cuda.device_count() or 2
    return tuple(2**k for k in range(count.bit_length()))


@dataclass(frozen=True)
class Scaling(Measurement):
    """Measure how all-reduce, DDP, FSDP and the 8B step scale over the GPUs of this machine; goes on where it was."""

    parts: tuple[Part, ...] = get_args(Part)
    """What to measure, in this order."""
    processes: tuple[int, ...] = field(default_factory=_up_to_all_gpus)
    """Numbers of processes, each with a GPU of its own. Default: 1, 2, 4, … up to all GPUs; without one, 1 and 2."""
    all_reduce_processes: tuple[int, ...] = ()
    """Numbers of processes of the all-reduce. Default: those above from 2 on, and 6 where there are so many GPUs."""
    sizes_mb: tuple[float, ...] = gpu_or_cpu((1, 10, 100, 1000), (0.1, 1))
    """Sizes of the all-reduce's tensors, in MB of 10^6 bytes."""
    size: SizeName = gpu_or_cpu("xl", "tiny")
    """Model of the training steps."""
    context: int = gpu_or_cpu(512, 32)
    """Tokens in a sequence."""
    weak_batch: int = 4
    """Sequences of each process where the batch grows with their number."""
    strong_batch: int = 16
    """Sequences of all processes together where it does not; a multiple of each of their numbers."""
    variants: tuple[Variant, ...] = get_args(Variant)
    """none: no communication, the floor, and all there is for one process."""
    mode: Mode = gpu_or_cpu("compiled", "eager")
    """compiled puts each block through torch.compile."""
    optimizer: AdamWName = gpu_or_cpu("fused", "basics")
    """Assignment 1's AdamW, the fused one, or PyTorch's."""
    warmup: int = 3
    """Steps before the clock starts."""
    steps: int = 8
    """Steps that are timed."""
    contestants: tuple[Contestant, ...] = gpu_or_cpu(("ours", "torch"), ("torch",))
    """Who runs the 8B step, from 2 processes on."""
    minutes: float = 8.0
    """Begin no set that is not likely to end by then, and end one that does not."""
    name: str = "scaling"

    def execute(self) -> None:
        check_options(self, "processes", "context", "weak_batch", "strong_batch", "steps", "minutes")
        device = device_of_process(self.device, 0)
        check_gpus(max((*self.processes, *self.all_reduce_processes), default=0), device.type)
        if odd := [count for count in self.processes if self.strong_batch % count]:
            raise ValueError(
                f"--strong-batch {self.strong_batch} does not split over {odd[0]} processes; choose another"
            )
        names = ("size", "context", "weak_batch", "strong_batch", "mode", "optimizer", "warmup", "steps")
        settings = {name: getattr(self, name) for name in names}
        settings |= {"variants": list(self.variants), "sizes_mb": list(self.sizes_mb)}
        file = self.result_file("scaling over the GPUs of a machine", device, **settings)
        rows = measured_before(file, settings)
        left = self.measure(device, rows, file)
        self.show(rows)
        plot(rows, self.out / f"{self.name}.png")
        file.announce()
        print(f"written: {self.out / f'{self.name}.png'}")
        if left:
            print(
                f"not measured within {self.minutes:g} minutes: {', '.join(left)}; the same command goes on there "
                "(with more --minutes, if it does not get on)"
            )

    def measure(self, device: torch.device, rows: list[Row], file: ResultFile) -> list[str]:
        """Measure the sets that `rows` lacks, and add them; returns what time did not suffice for."""
        deadline = time.monotonic() + 60 * self.minutes
        longest: dict[str, float] = {}  # seconds of a set, by part
        left = []
        for a_set in self.sets():
            if any(all(row.get(key) == a_set.get(key) for key in SET) for row in rows):
                continue
            what = " ".join(str(value) for value in a_set.values())
            seconds = deadline - time.monotonic()
            if seconds < longest.get(a_set["part"], 0.0) or seconds <= 0:
                left.append(what)
                continue
            began = time.monotonic()
            with tempfile.TemporaryDirectory() as scratch:  # for rows of a set that is not whole yet
                try:
                    new = self.measure_set(a_set, device, seconds, ResultFile(Path(scratch), "set", "", device))
                except TimeoutError:
                    left.append(what)
                    continue
            longest[a_set["part"]] = max(longest.get(a_set["part"], 0.0), time.monotonic() - began)
            rows += [a_set | row | {key: file.head[key] for key in ORIGIN} for row in new]
            _compare(rows)
            file.write(rows)
            print(f"{what}: {time.monotonic() - began:.0f} s", flush=True)
        return left

    def sets(self) -> Iterator[Row]:
        """What to measure, as the beginnings of rows."""
        gpus = torch.cuda.device_count()
        for part in self.parts:
            counts = self.processes if part in ("weak", "strong") else [n for n in self.processes if n > 1]
            if part == "all-reduce":
                counts = self.all_reduce_processes or sorted({*counts, *([6] if gpus >= 6 else [])})
            for count in counts:
                a_set = {"part": part, "processes": count}
                if part in ("weak", "strong") and count == 1 and "none" not in self.variants:
                    continue
                yield from [a_set | {"contestant": who} for who in self.contestants] if part == "8B" else [a_set]

    def measure_set(self, a_set: Row, device: torch.device, seconds: float, file: ResultFile) -> list[Row]:
        """The rows of a set.

        Raises:
            TimeoutError: it took longer than `seconds`.
        """
        part, count = a_set["part"], a_set["processes"]
        if part == "8B":
            options = Leaderboard2026(
                device=self.device, processes=count, contestants=(a_set["contestant"],), warmup=1, steps=2,
                timeout_s=seconds,
            )  # fmt: skip
            return leaderboard_rows(options, device, file)
        start = partial(run_processes, device=device.type, timeout_s=seconds)
        if part == "all-reduce":
            backend = "nccl" if device.type == "cuda" else "gloo"
            cases = [{"backend": backend, "processes": count, "size_MB": size} for size in self.sizes_mb]
            return start(time_all_reduces, count, cases, 2, 1000, file, [])[0]
        batch = self.strong_batch // count if part == "strong" else self.weak_batch
        options_of_step = ParallelMeasurement(
            device=self.device, processes=count, size=self.size, context=self.context, batch_size=batch,
            attention="flash" if device.type == "cuda" else "plain", warmup=self.warmup, steps=self.steps,
        )  # fmt: skip
        config = options_of_step.step_config(device, self.mode, self.optimizer)
        if part == "optimizer-state":
            cases = [{"sharding": sharding} for sharding in ("none", "ours", "torch")]
        else:
            cases = [{"variant": variant} for variant in self.variants if count > 1 or variant == "none"]
        return start(measure_steps, count, options_of_step, config, self.optimizer, cases, file)[0]

    def show(self, rows: list[Row]) -> None:
        """Print tables."""
        for part, columns in (
            ("all-reduce", ("processes", "size_MB", "ms", "bus_GB/s")),
            ("weak", ("processes", "variant", "step_ms", "tok/s", "efficiency_%", "exposed_%", *MEMORY)),
            ("strong", ("processes", "variant", "step_ms", "tok/s", "efficiency_%", "exposed_%", *MEMORY)),
            ("optimizer-state", ("processes", "sharding", "state_MB", "predicted_state_MB", *MEMORY)),
            ("8B", ("processes", "contestant", "seconds", "tokens/s", "of_matmul", "peak_GB")),
        ):
            if of_part := [row for row in rows if row["part"] == part]:
                show(part, of_part, columns)


def measured_before(file: ResultFile, settings: Row) -> list[Row]:
    """The rows that are in the file already.

    Raises:
        ValueError: they are of another device or of other settings.
    """
    if not file.path.exists():
        return []
    before: dict[str, Any] = json.loads(file.path.read_text(encoding="utf-8"))
    asked = settings | {"device": file.head["device"]}
    for key, value in asked.items():
        if before.get(key) != value:
            raise ValueError(
                f"{file.path} has rows of {key} {before.get(key)}, not {value}; choose another --name, or delete it"
            )
    return before["rows"]


def measure_steps(
    process: Process, options: ParallelMeasurement, config: StepConfig, optimizer: AdamWName, cases: list[Row],
    file: ResultFile,
) -> list[Row]:  # fmt: skip
    """Rows of training steps, measured in all processes."""

    def measure(case: Row) -> Row:
        parallelism = case.get("variant", "bucketed")
        one = replace(config, mode="eager") if "sharding" in case else config
        parallel = ParallelConfig(one, parallelism, optimizer=optimizer, sharding=case.get("sharding", "none"))
        return measure_memory_and_time(parallel, process, options)

    return run_cases(process, cases, measure, partial(_summary, options), file)


def _summary(options: ParallelMeasurement, case: Row, of_processes: list[Row]) -> Row:
    row = summary([one["times"] for one in of_processes])
    row["tok/s"] = options.tokens_per_second(row["step_ms"])
    peaks = [
        {"peak_GB": max(one["before_step_GB"], one["during_step_GB"])}
        for one in of_processes
        if one["during_step_GB"] is not None
    ]
    row |= largest(peaks, "peak_GB") | largest(of_processes, "held_GB") | largest(of_processes, "state_MB")
    if "sharding" in case:
        count = sum(parameter_counts(model_config(options.size, options.context)).values())
        ranks = options.processes if case["sharding"] != "none" else 1
        row["predicted_state_MB"] = STATE["fp32"].optimizer * count / ranks / MB
        row["predicted_held_GB"] = training_bytes_per_rank(count, ranks, 1) / GB
    return row


def _compare(rows: list[Row]) -> None:
    """Efficiency against one process, and the share of a step that communication takes."""
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
    """Draw bandwidth, both kinds of scaling, and the optimizer's state, as PNG."""
    import matplotlib

    matplotlib.use("Agg")  # files only: no display is needed
    import matplotlib.pyplot as plt

    figure, ((bandwidth, state), (weak, strong)) = plt.subplots(2, 2, figsize=(9, 6.4), layout="constrained")
    rows = sorted((row for row in rows if row["status"] == OK), key=lambda row: row["processes"])
    of = {part: [row for row in rows if row["part"] == part] for part in get_args(Part)}
    for count in dict.fromkeys(row["processes"] for row in of["all-reduce"]):
        line = [row for row in of["all-reduce"] if row["processes"] == count]
        bandwidth.loglog(
            [row["size_MB"] for row in line], [row["bus_GB/s"] for row in line], marker="o", label=f"{count} processes"
        )
    bandwidth.set(title="all-reduce", xlabel="message (MB)", ylabel="bus bandwidth (GB/s)")
    for sharding, label in (("none", "not sharded"), ("ours", "ours"), ("torch", "ZeroRedundancyOptimizer")):
        line = [row for row in of["optimizer-state"] if row["sharding"] == sharding]
        counts = [row["processes"] for row in line]
        state.plot(counts, [row["state_MB"] / 1e3 for row in line], "o", label=label)
        state.plot(counts, [row["predicted_state_MB"] / 1e3 for row in line], ":", color="#777777")
    state.set(title="AdamW's state (dotted: the formula)", xlabel="processes", ylabel="GB per process")
    for axes, part in ((weak, "weak"), (strong, "strong")):
        for variant, label in LABELS.items():
            line = [row for row in of[part] if row["variant"] == variant or row["processes"] == 1]
            axes.plot([row["processes"] for row in line], [row["tok/s"] for row in line], marker="o", label=label)
        if alone := next((row for row in of[part] if row["processes"] == 1), None):
            counts = sorted({row["processes"] for row in of[part]})
            axes.plot(counts, [alone["tok/s"] * count for count in counts], ":", color="#777777", label="ideal")
        axes.set(title=f"{part} scaling", xlabel="processes", ylabel="tokens/s")
    for axes in (state, weak, strong):
        axes.set_xticks(sorted({row["processes"] for row in rows}))
    for axes in (bandwidth, state, weak, strong):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    destination.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(destination, dpi=130)
    plt.close(figure)
