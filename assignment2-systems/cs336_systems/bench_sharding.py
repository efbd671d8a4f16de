"""What sharding the optimizer's state saves and costs: the course's optimizer_state_sharding_accounting."""

from dataclasses import dataclass
from functools import partial

from cs336_basics.accounting import parameter_counts
from cs336_systems.accounting import GB, MB, STATE, training_bytes_per_rank
from cs336_systems.measure import ResultFile, Row, grid, show, synchronize
from cs336_systems.models import model_config
from cs336_systems.parallel.process_group import Process
from cs336_systems.parallel_step import (
    NO_MEMORY_ON_CPU,
    AdamWName,
    ParallelConfig,
    ParallelMeasurement,
    ParallelStep,
    StateSharding,
    clear_memory_statistics,
    held_gb,
    largest,
    optimizer_state_bytes,
    peak_gb,
    run_cases,
    summary,
)
from cs336_systems.training_step import StepConfig

#: Peaks: while the model is made, until the optimizer's step begins, during it. Held: after it.
MEMORY = ("init_GB", "before_step_GB", "during_step_GB", "held_GB")
STATE_AND_TIME = ("state_MB", "least_state_MB", "predicted_state_MB", "optimizer_ms", "step_ms", "std_ms")


@dataclass(frozen=True)
class BenchSharding(ParallelMeasurement):
    """Measure memory and time of a training step with and without sharding of the optimizer's state."""

    optimizers: tuple[AdamWName, ...] = ("basics", "torch")
    """Assignment 1's AdamW, the fused one, or PyTorch's."""
    shardings: tuple[StateSharding, ...] = ("none", "ours", "torch")
    """none: each process keeps all state. ours: ShardedOptimizer. torch: ZeroRedundancyOptimizer."""
    name: str = "bench_sharding"

    def execute(self) -> None:
        device = self.checked_device()
        configs = {name: self.step_config(device, "eager", name) for name in self.optimizers}
        cases = grid(optimizer=self.optimizers, sharding=self.shardings)
        if not cases:
            raise ValueError("there is nothing to measure: an option that takes several values got none")
        what = "sharding of the optimizer's state"
        file = self.result_file(what, device, **self.settings())
        rows = self.start(measure_sharding, device, self, configs, cases, file)
        names = ("optimizer", "sharding")
        show(
            f"{what}: its bytes, and time", rows, (*names, *STATE_AND_TIME), settings=names[:1], common=self.settings()
        )
        if device.type == "cuda":
            show("memory", rows, (*names, *MEMORY, "predicted_held_GB"), settings=names[:1])
        if device.type == "cpu":
            print(NO_MEMORY_ON_CPU)
        file.announce()


def measure_sharding(
    process: Process, options: BenchSharding, configs: dict[AdamWName, StepConfig], cases: list[Row], file: ResultFile
) -> list[Row]:
    """The rows, measured in all processes."""

    def measure(case: Row) -> Row:
        name = case["optimizer"]
        return measure_memory_and_time(
            ParallelConfig(configs[name], "bucketed", optimizer=name, sharding=case["sharding"]), process, options
        )

    return run_cases(process, cases, measure, partial(summarize, options), file)


def measure_memory_and_time(config: ParallelConfig, process: Process, options: ParallelMeasurement) -> Row:
    """Memory at three moments, bytes of state and times of steps, in this process.

    Memory is that of a later step, when the optimizer has its state.
    """
    device = process.device
    clear_memory_statistics(device)
    step = ParallelStep(config, process)
    row: Row = {"init_GB": peak_gb(device)}
    for _ in range(max(1, options.warmup)):
        step.run()
    peaks: list[float | None] = []

    def mark() -> None:
        synchronize(device)
        peaks.append(peak_gb(device))
        clear_memory_statistics(device)

    clear_memory_statistics(device)
    step.run(mark)  # marks the end of the backward pass, of communication, of the optimizer's step
    row |= {"before_step_GB": _most(peaks[:2]), "during_step_GB": peaks[2], "held_GB": held_gb(device)}
    row["state_MB"] = optimizer_state_bytes(step.optimizer) / MB
    return row | {"times": [step.timed() for _ in range(options.steps)]}


def summarize(options: BenchSharding, case: Row, of_processes: list[Row]) -> Row:
    """The rest of a row: of each measurement the largest among the processes, beside what is predicted."""
    row: Row = {}
    for key in MEMORY:
        row |= largest(of_processes, key)
    states = [one["state_MB"] for one in of_processes]
    count = sum(parameter_counts(model_config(options.size, options.context)).values())
    sharded = case["sharding"] != "none"
    times = summary([one["times"] for one in of_processes])
    return row | {
        "predicted_held_GB": training_bytes_per_rank(count, options.processes, 1 if sharded else 0) / GB,
        "state_MB": max(states),
        "least_state_MB": min(states),
        "predicted_state_MB": STATE["fp32"].optimizer * count / (options.processes if sharded else 1) / MB,
        "optimizer_ms": times["optimizer_ms"],
        "step_ms": times["step_ms"],
        "std_ms": times["std_ms"],
        "states_MB": states,
    }


def _most(values: list[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)
