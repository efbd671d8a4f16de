"""Fully sharded data parallelism beside PyTorch's and beside DDP: time, memory, and bytes sent.

With bf16, DDP computes under autocast and averages float32 gradients. Where weights are sharded they are cast before
they are gathered, and their gradients are averaged in bf16: half the bytes, and a residual stream in bf16.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from cs336_basics.accounting import parameter_counts
from cs336_systems.accounting import BF16, FP32, GB, MB, fsdp_costs, step_traffic_bytes, training_bytes_per_rank
from cs336_systems.measure import ResultFile, Row, grid, show
from cs336_systems.models import model_config
from cs336_systems.parallel.process_group import Process
from cs336_systems.parallel_step import (
    NO_MEMORY_ON_CPU,
    AdamWName,
    ParallelConfig,
    ParallelMeasurement,
    ParallelStep,
    clear_memory_statistics,
    held_gb,
    largest,
    peak_gb,
    run_cases,
    summary,
)
from cs336_systems.training_step import Mode, StepConfig

#: bucketed: DDP. fsdp: ours, a block is a unit. fsdp-linear: ours, a Linear is one. fully-shard: PyTorch's, of blocks.
FsdpVariant = Literal["bucketed", "fsdp", "fsdp-linear", "fully-shard"]
Checkpointed = Literal["none", "block"]

PARTS = ("forward_backward_ms", "after_backward_ms", "optimizer_ms")
#: The peak of a step, and what is held before the first one and between later ones.
MEMORY = ("peak_GB", "init_GB", "held_GB")


@dataclass(frozen=True)
class BenchFsdp(ParallelMeasurement):
    """Measure a training step with sharded weights, ours and PyTorch's, beside DDP."""

    variants: tuple[FsdpVariant, ...] = ("bucketed", "fsdp", "fsdp-linear", "fully-shard")
    """bucketed: DDP, nothing sharded. fsdp: ours, a block is a unit. fsdp-linear: ours, every Linear is one.
    fully-shard: PyTorch's, on each block."""
    modes: tuple[Mode, ...] = ("eager",)
    """compiled puts each block of the model through torch.compile."""
    checkpointing: tuple[Checkpointed, ...] = ("none", "block")
    """block: each block's forward pass is repeated in the backward pass, and its activations are not kept."""
    optimizer: AdamWName = "basics"
    """Assignment 1's AdamW, the fused one, or PyTorch's."""
    name: str = "bench_fsdp"

    def execute(self) -> None:
        device = self.checked_device()
        config = self.step_config(device, "eager", self.optimizer)
        cases = grid(mode=self.modes, checkpointing=self.checkpointing, variant=self.variants)
        cases = [{"variant": case["variant"]} | case for case in cases]  # first: rows that fail are named by it
        if not cases:
            raise ValueError("there is nothing to measure: an option that takes several values got none")
        settings = self.settings() | {"optimizer": self.optimizer}
        what = "training step with sharded weights"
        file = self.result_file(what, device, **settings)
        rows = self.start(measure_fsdp, device, self, config, cases, file)
        axes = ("mode", "checkpointing", "variant")
        time, costs = ("step_ms", "std_ms", *PARTS, "tok/s"), (*MEMORY, "predicted_held_GB", "sent_MB")
        show(what, rows, (*axes, *time), settings=axes[:2], common=settings)
        show("its memory, and the bytes it sends (predicted)", rows, (*axes, *costs), settings=axes[:2])
        if device.type == "cpu":
            print(NO_MEMORY_ON_CPU)
        file.announce()


def measure_fsdp(
    process: Process, options: BenchFsdp, config: StepConfig, cases: list[Row], file: ResultFile
) -> list[Row]:
    """The rows, measured in all processes."""

    def measure(case: Row) -> Row:
        parallel = ParallelConfig(
            replace(config, mode=case["mode"]), case["variant"], optimizer=options.optimizer,
            checkpointing=case["checkpointing"],
        )  # fmt: skip
        return measure_step(parallel, process, options)

    return run_cases(process, cases, measure, partial(summarize, options), file)


def measure_step(config: ParallelConfig, process: Process, options: BenchFsdp) -> Row:
    """Memory and times of steps in this process."""
    device = process.device
    clear_memory_statistics(device)
    step = ParallelStep(config, process)
    row: Row = {"init_GB": held_gb(device)}
    for _ in range(max(1, options.warmup)):
        step.run()
    clear_memory_statistics(device)
    times = [step.timed() for _ in range(options.steps)]
    return row | {"times": times, "peak_GB": peak_gb(device), "held_GB": held_gb(device)}


def summarize(options: BenchFsdp, case: Row, of_processes: list[Row]) -> Row:
    """The rest of a row: times of the slowest process, the most memory, and what is predicted."""
    row = summary([one["times"] for one in of_processes])
    row["tok/s"] = options.tokens_per_second(row["step_ms"])
    for key in MEMORY:
        row |= largest(of_processes, key)
    held, sent = predicted(options, case["variant"])
    return row | {"predicted_held_GB": held / GB, "sent_MB": sent / MB}


def predicted(options: BenchFsdp, variant: FsdpVariant) -> tuple[float, float]:
    """Bytes on each process: held from step to step (weights, gradients, moments), and sent in a step."""
    config, ranks = model_config(options.size, options.context), options.processes
    count = sum(parameter_counts(config).values())
    sent_in = BF16 if options.precision == "bf16" else FP32
    if variant == "bucketed":
        return training_bytes_per_rank(count, ranks, 0), step_traffic_bytes(count, ranks)["DDP"]
    if variant == "fully-shard":  # norms too
        return training_bytes_per_rank(count, ranks, 3), step_traffic_bytes(count, ranks, sent_in)["ZeRO-3"]
    costs = fsdp_costs(config, ranks, sent_in)
    return costs.state, costs.sent
