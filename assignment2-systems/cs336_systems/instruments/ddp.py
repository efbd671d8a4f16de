"""Time a training step under data parallelism, and find how much of it is communication.

These are the course's naive_ddp_benchmarking, minimal_ddp_flat_benchmarking,
ddp_overlap_individual_parameters_benchmarking and ddp_bucketed_benchmarking. All variants run on one set of ranks, in
several rounds, so that a warm or busy minute affects all of them. The floor is the variant "none", in which ranks do
not communicate: a step's time beyond it is communication that is not hidden behind computation. Ranks that exchange
gradients also wait for each other, which costs time where their steps vary; the floor for that is "none" with each step
as long as that of its slowest rank (`paced`).
"""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from cs336_basics.accounting import parameter_counts
from cs336_systems.instruments import overlap, ranks
from cs336_systems.instruments.measure import OK, ResultFile, Row, check_cases, print_table, result_file
from cs336_systems.instruments.options.common import check_options
from cs336_systems.instruments.options.many_gpus import BenchDdp
from cs336_systems.parallel.process_group import Rank
from cs336_systems.theory.collectives import ring_bytes
from cs336_systems.theory.units import FLOAT32, MB
from cs336_systems.training.choices import BucketSize, model_config
from cs336_systems.training.step import StepConfig, TrainingStep

#: Columns of the second and the third table.
PARTS = ("forward_backward_ms", "after_backward_ms", "optimizer_ms")
OVERLAP_COLUMNS = ("compute_ms", "communication_ms", "in_backward_%", "hidden_%")


def run(options: BenchDdp) -> None:
    """Measure, print tables, and write a file and a picture."""
    device = ranks.checked_device(options)
    check_options(options, "rounds")
    for size in (*options.bucket_mib, *options.torch_bucket_mib):
        if size != "auto" and size <= 0:
            raise ValueError(f"a bucket of {size} MiB was requested; choose a positive size")
    config = ranks.step_config(options, device, options.mode, options.optimizer)
    cases = cases_of(options)
    check_cases(cases)
    settings = ranks.shared_settings(options)
    settings |= {"mode": options.mode, "optimizer": options.optimizer, "rounds": options.rounds}
    what = "training step under data parallelism"
    file = result_file(options, what, device, **settings)
    rows = ranks.start_ranks(options, measure_ddp, device, options, config, cases, file)
    for title, columns in (
        (what, ("step_ms", "std_ms", "drift_%", "exposed_ms", "exposed_%", "paced_ms", "beyond_paced_%", "tok/s")),
        ("its parts, bytes sent (predicted), memory", (*PARTS, "sent_MB", "peak_GB")),
        ("one profiled step of rank 0", OVERLAP_COLUMNS if options.trace else ()),
    ):
        if columns:
            print_table(title, rows, ("variant", "bucket_MiB", *columns), common=settings if title == what else None)
    if device.type == "cpu":
        print(ranks.NO_MEMORY_ON_CPU)
    file.announce()
    if options.trace:
        print(f"written: {picture(options)}")


def picture(options: BenchDdp) -> Path:
    """Return the path of the picture of the profiled steps."""
    return options.out / f"{options.name}.png"


def cases_of(options: BenchDdp) -> list[Row]:
    """Return a row for each variant and bucket size."""
    sizes: dict[str, tuple[BucketSize, ...]] = {
        "bucketed": options.bucket_mib, "torch-ddp": options.torch_bucket_mib,
    }  # fmt: skip
    return [
        {"variant": variant} | ({"bucket_MiB": size} if size else {})
        for variant in options.variants
        for size in sizes.get(variant, (None,))
    ]


def measure_ddp(rank: Rank, options: BenchDdp, config: StepConfig, cases: list[Row], file: ResultFile) -> list[Row]:
    """Measure the rows on all ranks; rank 0 writes the file after each variant of each round."""
    rows: list[Row] = [case | {"status": OK} for case in cases]
    times: list[list[list[ranks.StepTimes]]] = [[] for _ in rows]  # [row][round or none][rank] -> of all steps
    rounds: list[list[float]] = [[] for _ in rows]
    configs = [replace(config, container=case["variant"], bucket_mib=case.get("bucket_MiB", "auto")) for case in cases]
    with ranks.progress_on_rank_0(rank, (options.rounds + options.trace) * len(rows)) as start:
        for number in range(1, options.rounds + 1):
            for index, row in enumerate(rows):
                start(f"round {number}: {label(row)}")
                if row["status"] != OK:
                    continue
                status, measured = ranks.measure_on_all_ranks(partial(time_steps, configs[index], rank, options))
                row |= status
                if not measured:
                    continue
                of_round = [one["times"] for one in measured]
                times[index] = [a + b for a, b in zip(times[index], of_round)] if times[index] else of_round
                rounds[index].append(ranks.summary(of_round)["step_ms"])
                row |= ranks.summary(times[index]) | ranks.largest([row, *measured], "peak_GB")
                row |= _derived(options, row, rounds[index])
                _compare_with_floor(rows)
                if rank.rank == 0:
                    file.write(rows)
        if options.trace:
            _trace_all(rank, options, configs, rows, start)
            if rank.rank == 0:
                file.write(rows)
    return rows


def _trace_all(
    rank: Rank, options: BenchDdp, configs: list[StepConfig], rows: list[Row], start: Callable[[str], None]
) -> None:
    """Add to each row what overlaps in one profiled step, and draw the steps."""
    timelines: dict[str, overlap.StepTimeline] = {}
    for config, row in zip(configs, rows, strict=True):
        start(f"profile: {label(row)}")
        if row["status"] == OK:
            status, measured = ranks.measure_on_all_ranks(partial(trace_step, config, rank, options, row, timelines))
            row |= status | (measured[0]["overlap"] if measured else {})
    if rank.rank == 0:
        model = f"{options.size}, {options.processes} ranks, {options.batch_size} x {options.context} tokens"
        overlap.plot_timelines(timelines, picture(options), f"one training step of rank 0: {model} each")


def time_steps(config: StepConfig, rank: Rank, options: BenchDdp) -> Row:
    """Measure the times of all steps of one round on this rank, and the peak memory."""
    step = TrainingStep(config, rank)
    for _ in range(options.warmup):
        step.full()
    ranks.clear_memory_statistics(rank.device)
    times = [ranks.time_step(step) for _ in range(options.steps)]
    return {"times": times, "peak_GB": ranks.peak_gb(rank.device)}


def trace_step(
    config: StepConfig, rank: Rank, options: BenchDdp, row: Row, timelines: dict[str, overlap.StepTimeline]
) -> Row:
    """Profile a step of rank 0, return what overlaps in it, and add its timeline to `timelines`."""
    step = TrainingStep(config, rank)
    for _ in range(max(1, options.warmup)):
        step.full()
    if rank.rank:
        for _ in range(overlap.TRACED_STEPS):
            step.full()
        return {}
    keep = options.out / f"{options.name}_{label(row).replace(' ', '_')}.trace.json.gz" if options.keep_traces else None
    timeline = overlap.step_timeline(overlap.record_step(step.full, rank.device, keep))
    timelines[label(row)] = timeline
    return {"overlap": overlap.overlap_row(timeline)}


def label(row: Mapping[str, object]) -> str:
    """Name a row by its variant and the size of its buckets."""
    size = row.get("bucket_MiB")
    if size is None:
        return str(row["variant"])
    return f"{row['variant']} {size if size == 'auto' else f'{size:g} MiB'}"


def _derived(options: BenchDdp, row: Row, rounds: list[float]) -> Row:
    """Derive the rest of a row from its times; the bytes sent are predicted for a ring and float32 gradients."""
    gradients = FLOAT32 * sum(parameter_counts(model_config(options.size, options.context)).values())
    sent = 0.0 if row["variant"] == "none" else ring_bytes(gradients, options.processes)
    return {
        "drift_%": 100 * (max(rounds) - min(rounds)) / statistics.median(rounds),
        "sent_MB": sent / MB,
        "tok/s": ranks.tokens_per_second(options, row["step_ms"]),
        "round_ms": list(rounds),
    }


def _compare_with_floor(rows: list[Row]) -> None:
    """Add exposed communication: the time of a step minus that of a step without communication."""
    floor = next((row for row in rows if row["variant"] == "none" and "step_ms" in row), None)
    for row in rows:
        if floor is not None and "step_ms" in row and row["variant"] != "none":
            row["exposed_ms"] = row["step_ms"] - floor["step_ms"]
            row["exposed_%"] = 100 * row["exposed_ms"] / row["step_ms"]
            row["beyond_paced_%"] = 100 * (row["paced_ms"] / floor["paced_ms"] - 1)
