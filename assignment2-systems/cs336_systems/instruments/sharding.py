"""Measure what sharding the optimizer's state saves and costs: the course's optimizer_state_sharding_accounting."""

from dataclasses import replace
from functools import partial

from cs336_basics.accounting import parameter_counts
from cs336_systems.instruments import ranks
from cs336_systems.instruments.measure import (
    ResultFile,
    Row,
    cartesian,
    check_cases,
    print_table,
    result_file,
    synchronize,
)
from cs336_systems.instruments.options.common import RanksMeasurement
from cs336_systems.instruments.options.many_gpus import BenchSharding
from cs336_systems.parallel.process_group import Rank
from cs336_systems.theory.state import STATE, training_bytes_per_rank
from cs336_systems.theory.units import GB, MB
from cs336_systems.training.choices import OptimizerName, model_config
from cs336_systems.training.step import StepConfig, TrainingStep

#: Peaks while the model is built, until the optimizer's step begins, and during it; and the memory held after it.
MEMORY = ("init_GB", "before_step_GB", "during_step_GB", "held_GB")
STATE_AND_TIME = ("state_MB", "least_state_MB", "predicted_state_MB", "optimizer_ms", "step_ms", "std_ms")


def run(options: BenchSharding) -> None:
    """Measure, print tables and write a file."""
    device = ranks.checked_device(options)
    configs = {name: ranks.step_config(options, device, "eager", name) for name in options.optimizers}
    cases = cartesian(optimizer=options.optimizers, sharding=options.shardings)
    check_cases(cases)
    what = "sharding of the optimizer's state"
    settings = ranks.shared_settings(options)
    file = result_file(options, what, device, **settings)
    rows = ranks.start_ranks(options, measure_sharding, device, options, configs, cases, file)
    names = ("optimizer", "sharding")
    columns = (*names, *STATE_AND_TIME)
    print_table(f"{what}: its bytes, and time", rows, columns, settings=names[:1], common=settings)
    if device.type == "cuda":
        print_table("memory", rows, (*names, *MEMORY, "predicted_held_GB"), settings=names[:1])
    if device.type == "cpu":
        print(ranks.NO_MEMORY_ON_CPU)
    file.announce()


def measure_sharding(
    rank: Rank, options: BenchSharding, configs: dict[OptimizerName, StepConfig], cases: list[Row], file: ResultFile
) -> list[Row]:
    """Measure the rows on all ranks."""

    def measure(case: Row) -> Row:
        config = replace(configs[case["optimizer"]], container="bucketed", sharding=case["sharding"])
        return measure_memory_and_time(config, rank, options)

    return ranks.run_cases(rank, cases, measure, partial(summarize, options), file)


def measure_memory_and_time(config: StepConfig, rank: Rank, options: RanksMeasurement) -> Row:
    """Measure memory at three moments, the bytes of the state, and times of steps, on this rank.

    Memory is that of a later step, when the optimizer has its state.
    """
    device = rank.device
    ranks.clear_memory_statistics(device)
    step = TrainingStep(config, rank)
    row: Row = {"init_GB": ranks.peak_gb(device)}
    for _ in range(max(1, options.warmup)):
        step.full()
    peaks: list[float | None] = []

    def mark() -> None:
        synchronize(device)
        peaks.append(ranks.peak_gb(device))
        ranks.clear_memory_statistics(device)

    ranks.clear_memory_statistics(device)
    step.full(mark)  # marks the end of the backward pass, of communication, and of the optimizer's step
    row |= {"before_step_GB": _most(peaks[:2]), "during_step_GB": peaks[2], "held_GB": ranks.held_gb(device)}
    row["state_MB"] = ranks.optimizer_state_bytes(step.optimizer) / MB
    return row | {"times": [ranks.time_step(step) for _ in range(options.steps)]}


def summarize(options: BenchSharding, case: Row, of_ranks: list[Row]) -> Row:
    """Make the rest of a row: the largest of each measurement among the ranks, and the predictions."""
    row: Row = {}
    for key in MEMORY:
        row |= ranks.largest(of_ranks, key)
    states = [one["state_MB"] for one in of_ranks]
    count = sum(parameter_counts(model_config(options.size, options.context)).values())
    sharded = case["sharding"] != "none"
    times = ranks.summary([one["times"] for one in of_ranks])
    return row | {
        "predicted_held_GB": training_bytes_per_rank(count, options.processes, 1 if sharded else 0) / GB,
        "state_MB": max(states),
        "least_state_MB": min(states),
        "predicted_state_MB": STATE["float32"].optimizer * count / (options.processes if sharded else 1) / MB,
        "optimizer_ms": times["optimizer_ms"],
        "step_ms": times["step_ms"],
        "std_ms": times["std_ms"],
        "states_MB": states,
    }


def _most(values: list[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)
