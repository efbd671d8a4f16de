"""Measure fully sharded data parallelism, ours and PyTorch's, in comparison with DDP: time, memory, and bytes sent.

With bfloat16, DDP computes under autocast and averages float32 gradients. Sharded weights are cast before they are
gathered, and their gradients are averaged in bfloat16: half the bytes, and a residual stream in bfloat16.
"""

from dataclasses import replace
from functools import partial

from cs336_basics.accounting import parameter_counts
from cs336_systems.instruments import ranks
from cs336_systems.instruments.measure import ResultFile, Row, cartesian, check_cases, print_table, result_file
from cs336_systems.instruments.options.many_gpus import BenchFsdp, FsdpVariant
from cs336_systems.parallel.process_group import Rank
from cs336_systems.theory.state import fsdp_costs, step_traffic_bytes, training_bytes_per_rank
from cs336_systems.theory.units import BFLOAT16, FLOAT32, GB, MB
from cs336_systems.training.choices import model_config
from cs336_systems.training.step import StepConfig, TrainingStep

PARTS = ("forward_backward_ms", "after_backward_ms", "optimizer_ms")
#: The peak of a step, and the memory held before the first step and between later ones.
MEMORY = ("peak_GB", "init_GB", "held_GB")


def run(options: BenchFsdp) -> None:
    """Measure, print tables and write a file."""
    device = ranks.checked_device(options)
    config = ranks.step_config(options, device, "eager", options.optimizer)
    cases = cartesian(mode=options.modes, checkpointing=options.checkpointing, variant=options.variants)
    cases = [{"variant": case["variant"]} | case for case in cases]  # first: rows that fail are named by it
    check_cases(cases)
    settings = ranks.shared_settings(options) | {"optimizer": options.optimizer}
    what = "training step with sharded weights"
    file = result_file(options, what, device, **settings)
    rows = ranks.start_ranks(options, measure_fsdp, device, options, config, cases, file)
    axes = ("mode", "checkpointing", "variant")
    time, costs = ("step_ms", "std_ms", *PARTS, "tok/s"), (*MEMORY, "predicted_held_GB", "sent_MB")
    print_table(what, rows, (*axes, *time), settings=axes[:2], common=settings)
    print_table("its memory, and the bytes it sends (predicted)", rows, (*axes, *costs), settings=axes[:2])
    if device.type == "cpu":
        print(ranks.NO_MEMORY_ON_CPU)
    file.announce()


def measure_fsdp(rank: Rank, options: BenchFsdp, config: StepConfig, cases: list[Row], file: ResultFile) -> list[Row]:
    """Measure the rows on all ranks."""

    def measure(case: Row) -> Row:
        parts = {"mode": case["mode"], "container": case["variant"], "checkpointing": case["checkpointing"]}
        return measure_step(replace(config, **parts), rank, options)

    return ranks.run_cases(rank, cases, measure, partial(summarize, options), file)


def measure_step(config: StepConfig, rank: Rank, options: BenchFsdp) -> Row:
    """Measure memory and times of steps on this rank."""
    device = rank.device
    ranks.clear_memory_statistics(device)
    step = TrainingStep(config, rank)
    row: Row = {"init_GB": ranks.held_gb(device)}
    for _ in range(max(1, options.warmup)):
        step.full()
    ranks.clear_memory_statistics(device)
    times = [ranks.time_step(step) for _ in range(options.steps)]
    return row | {"times": times, "peak_GB": ranks.peak_gb(device), "held_GB": ranks.held_gb(device)}


def summarize(options: BenchFsdp, case: Row, of_ranks: list[Row]) -> Row:
    """Make the rest of a row: times of the slowest rank, the most memory, and the predictions."""
    row = ranks.summary([one["times"] for one in of_ranks])
    row["tok/s"] = ranks.tokens_per_second(options, row["step_ms"])
    for key in MEMORY:
        row |= ranks.largest(of_ranks, key)
    held, sent = predicted(options, case["variant"])
    return row | {"predicted_held_GB": held / GB, "sent_MB": sent / MB}


def predicted(options: BenchFsdp, variant: FsdpVariant) -> tuple[float, float]:
    """Predict the bytes on each rank: held from step to step (weights, gradients, moments), and sent in a step."""
    config, ranks = model_config(options.size, options.context), options.processes
    count = sum(parameter_counts(config).values())
    sent_in = BFLOAT16 if options.precision == "bfloat16" else FLOAT32
    if variant == "bucketed":
        return training_bytes_per_rank(count, ranks, 0), step_traffic_bytes(count, ranks)["DDP"]
    if variant == "fully-shard":  # which shards norms too
        return training_bytes_per_rank(count, ranks, 3), step_traffic_bytes(count, ranks, sent_in)["ZeRO-3"]
    costs = fsdp_costs(config, ranks, sent_in)
    return costs.state, costs.sent
