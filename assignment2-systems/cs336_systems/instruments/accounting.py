"""Print what parallel training costs on paper, for the sizes of the course: the commands of its written problems.

The formulas are in `theory`; nothing is measured.
"""

import math
from dataclasses import replace

from rich.console import Console

from cs336_basics.accounting import parameter_counts
from cs336_basics.strategy import resolve_device
from cs336_systems.instruments.measure import Row, print_table, result_file
from cs336_systems.instruments.options.common import check_options
from cs336_systems.instruments.options.on_paper import Accounting
from cs336_systems.theory import collectives, state, tpu_mesh
from cs336_systems.theory.units import BFLOAT16, FLOAT32, GB, MB
from cs336_systems.training.choices import SIZES, model_config

#: Ways to reduce the batch that the formula does not cover.
TRICKS = (
    "Pipeline stages: each of k stages holds L/k blocks on N/k devices, so that the same batch gives a device k times "
    "the tokens, and a stage only sends on [tokens D]. The price is the bubble.",
    "Gradient accumulation does not help by itself: each microbatch must be compute bound on its own, unless weights "
    "are gathered once for all of them and kept.",
    "Collectives in pieces that overlap with the matmuls they feed.",
    "Replicas across slow links, shards within fast ones (HSDP): slow links carry one all-reduce of shards per step.",
)
BUFFER_MB = (0.001, 0.1, 1.0, 10.0, 100.0, 1000.0)
BUCKET_MB = (1.0, 10.0, 100.0, 1000.0)
RANKS = (2, 4, 8, 64)


def run(options: Accounting) -> None:
    """Calculate, print tables and write a file."""
    check_options(options, "memory_tokens", "batch_tokens")
    check_options(options, "world_size", "ring", least=2)
    for option in ("link_gb_per_s", "hop_latency_us", "call_overhead_us"):
        if not 0 < getattr(options, option) < math.inf:
            raise ValueError(f"--{option.replace('_', '-')} is {getattr(options, option)}, but must be positive")
    best = tpu_mesh.best_data_size(tpu_mesh.XXL, options.batch_tokens, tpu_mesh.COURSE_LAYOUT)
    tables = {
        "communication_accounting (a, b): memory of XXL": memory_rows(options),
        "communication_accounting (c, d): forward pass of XXL, tokens from which it is compute bound": batch_rows(),
        "data_parallel_calcs, fsdp_calcs, tp_calcs, fsdp_tp_calcs: XXL on TPU v5p": strategy_rows(options),
        f"alternate_ring_all_reduce: sent by each of {options.ring} ranks, and time": ring_rows(options),
        "alternate_ring_all_reduce: whole buffers are faster up to": crossover_rows(options),
        "optimizer_state_sharding_accounting: bytes per parameter": zero_rows(),
        f"optimizer_state_sharding_accounting: {options.size} in float32, a step of each rank": traffic_rows(options),
        "fsdp_accounting: per rank and step": fsdp_rows(options),
        f"ddp_bucketed_benchmarking (b): {options.size}, time after the backward pass": bucket_rows(options),
    }
    console = Console()
    for title, rows in tables.items():
        print_table(title, rows, settings=("tokens", "ranks"))
        for line in TRICKS if "(c, d)" in title else ():
            console.print(f"- {line}", highlight=False, markup=False)
        if "fsdp_tp_calcs" in title:
            console.print(f"Forward, FSDP × TP would communicate least at X = {best:.2f}.", highlight=False)
    file = result_file(options, "closed-form accounting of parallel training", resolve_device(options.device))
    rows = [{"table": title} | row for title, rows in tables.items() for row in rows]
    file.write(rows, tricks=TRICKS, best_data_size=best)
    file.announce()


def memory_rows(options: Accounting) -> list[Row]:
    """Compute the memory of XXL on one device, then with its state and half of its activations sharded."""
    tokens = options.memory_tokens
    state, saved = tpu_mesh.XXL.state_bytes(), tpu_mesh.XXL.saved_bytes(tokens)
    held = {
        "float32 master weights": FLOAT32 * tpu_mesh.XXL.num_parameters,
        "float32 gradients": FLOAT32 * tpu_mesh.XXL.num_parameters,
        "float32 AdamW moments": 2 * FLOAT32 * tpu_mesh.XXL.num_parameters,
        "all of these": state,
        "saved for backward: bfloat16 inputs of linear layers": saved,
        "all together": state + saved,
    }
    rows: list[Row] = [
        {"what": what, "devices": 1, "GB": size / GB, "H100s": math.ceil(size / tpu_mesh.H100_BYTES)}
        for what, size in held.items()
    ]
    for what, blocks in (("sharded, below 95 GB each", 0), ("the same and two gathered blocks", 2)):
        devices = tpu_mesh.devices_needed(tpu_mesh.XXL, tokens, tpu_mesh.TPU_V5P_BYTES, blocks)
        size = tpu_mesh.half_sharded_bytes(tpu_mesh.XXL, tokens, devices, blocks)
        rows.append({"what": what, "devices": devices, "GB": size / GB})
    return [{"tokens": tokens} | row for row in rows]


def strategy_rows(options: Accounting) -> list[Row]:
    """Compare all strategies on the number of devices and axes of the course's mesh."""
    course, tokens = tpu_mesh.COURSE_LAYOUT, options.batch_tokens
    devices, axes = course.devices, course.data_axes + course.tensor_axes
    layouts = [
        tpu_mesh.Layout("DP", devices, 1, data_axes=axes, sharded=False),
        tpu_mesh.Layout("FSDP", devices, 1, data_axes=axes),
        tpu_mesh.Layout("TP", 1, devices, tensor_axes=axes),
        course,
        min(
            _splits(course),
            key=lambda split: tpu_mesh.pass_times(tpu_mesh.XXL, tokens, split, tpu_mesh.TPU_V5P)[0].communication(),
        ),
    ]
    return [{"tokens": tokens, **_strategy_row(tokens, layout)} for layout in layouts]


def ring_rows(options: Accounting) -> list[Row]:
    """Compare both all-reduces over buffer sizes: bytes that each rank sends, and time."""
    link = options.link_gb_per_s * GB, options.hop_latency_us / 1e6
    rows = []
    for size in BUFFER_MB:
        row = {"buffer_MB": size, "ring_MB": collectives.ring_bytes(size, options.ring)}
        row |= {"whole_MB": collectives.whole_ring_bytes(size, options.ring)}
        row |= {"ring_us": collectives.ring_seconds(size * MB, options.ring, *link) * 1e6}
        rows.append(row | {"whole_us": collectives.whole_ring_seconds(size * MB, options.ring, *link) * 1e6})
    return rows


def crossover_rows(options: Accounting) -> list[Row]:
    """Compute the buffer size at which both all-reduces take equally long."""
    link = options.link_gb_per_s * GB, options.hop_latency_us / 1e6
    return [
        {"ring of": ranks, "MB": _or(collectives.crossover_bytes(ranks, *link) / MB, "any size")} for ranks in RANKS
    ]


def traffic_rows(options: Accounting) -> list[Row]:
    """Compare our sharded optimizer with DDP and ZeRO: bytes sent, and held from step to step."""
    count, ranks = sum(parameter_counts(model_config(options.size)).values()), options.world_size
    stages: tuple[state.Stage, ...] = (0, 1, 1, 2, 3)
    rows = []
    for (method, sent), stage in zip(state.step_traffic_bytes(count, ranks).items(), stages):
        held = state.training_bytes_per_rank(count, ranks, stage)
        rows.append({"method": method, "ranks": ranks, "sent_GB": sent / GB, "held_GB": held / GB})
    return rows


def fsdp_rows(options: Accounting) -> list[Row]:
    """Compute the costs of FSDP for the assignment's models, in both compute dtypes."""
    rows = []
    for size in SIZES:
        config = model_config(size)
        for name, compute_bytes in (("bfloat16", BFLOAT16), ("float32", FLOAT32)):
            costs = state.fsdp_costs(config, options.world_size, compute_bytes)
            row: Row = {"size": size, "compute": name, "ranks": options.world_size}
            row |= {"gather_forward_MB": costs.gather / MB, "gather_backward_MB": costs.gather / MB}
            row |= {"reduce_scatter_MB": costs.reduce_scatter / MB, "norms_MB": costs.replicated / MB}
            rows.append(row | {"gathered_peak_MB": costs.gathered_peak / MB, "state_MB": costs.state / MB})
    return rows


def bucket_rows(options: Accounting) -> list[Row]:
    """Compare the course's bucket sizes with the best one; w is the link's bandwidth as a ring can use it."""
    total = FLOAT32 * sum(parameter_counts(model_config(options.size)).values())
    bandwidth = total / collectives.ring_bytes(total, options.world_size) * options.link_gb_per_s * GB
    overhead_s = options.call_overhead_us / 1e6
    best = collectives.optimal_bucket_bytes(total, bandwidth, overhead_s) / MB
    rows = []
    for size in sorted((*BUCKET_MB, best)):
        buckets = max(1.0, total / (size * MB))
        after = collectives.ddp_overhead(total, bandwidth, overhead_s, buckets)
        rows.append({"bucket_MB": size, "buckets": buckets, "after_ms": after * 1e3, "best": size == best})
    return [row | {"best": "best" if row["best"] else None} for row in rows]


def batch_rows() -> list[Row]:
    """Compute the compute-bound batch on the course's mesh, and with the tricks that the formula covers."""
    eight_bits = replace(tpu_mesh.XXL, bytes_per_number=1)
    widest = min(
        _splits(tpu_mesh.COURSE_LAYOUT),
        key=lambda layout: tpu_mesh.compute_bound_tokens(tpu_mesh.XXL, layout, tpu_mesh.TPU_V5P),
    )
    cases = {
        "weights and activations at once": (tpu_mesh.XXL, tpu_mesh.COURSE_LAYOUT, True),
        "one after the other": (tpu_mesh.XXL, tpu_mesh.COURSE_LAYOUT, False),
        "sent in 8 bits": (eight_bits, tpu_mesh.COURSE_LAYOUT, True),
        "as much TP as pays": (tpu_mesh.XXL, widest, True),
    }
    rows: list[Row] = []
    for what, (stack, layout, at_once) in cases.items():
        tokens = tpu_mesh.compute_bound_tokens(stack, layout, tpu_mesh.TPU_V5P, at_once)
        row: Row = {"what": what, "X": layout.data, "Y": layout.tensor, "per_device": tokens}
        rows.append(row | {"batch": math.ceil(tokens * layout.devices)})
    least = tpu_mesh.least_tokens(tpu_mesh.XXL, tpu_mesh.COURSE_LAYOUT, tpu_mesh.TPU_V5P)
    return [*rows, {"what": "bound for any X · Y", "per_device": least}]


def zero_rows() -> list[Row]:
    """Compute the bytes per parameter of ZeRO's stages for both precisions and several numbers of ranks."""
    return [
        {"precision": precision, "stage": stage, **{f"{n} ranks": state.per_rank(n, stage) for n in RANKS}}
        for precision, state in state.STATE.items()
        for stage in (0, 1, 2, 3)
    ]


def _splits(layout: tpu_mesh.Layout) -> list[tpu_mesh.Layout]:
    """Return all splits X · Y of a layout's devices with both factors above 1."""
    n = layout.devices
    return [replace(layout, data=x, tensor=n // x) for x in range(2, n) if n % x == 0]


def _strategy_row(tokens: int, layout: tpu_mesh.Layout) -> Row:
    forward, backward = tpu_mesh.pass_times(tpu_mesh.XXL, tokens, layout, tpu_mesh.TPU_V5P)
    return {
        "strategy": layout.name,
        "X": layout.data,
        "Y": layout.tensor,
        "GB": tpu_mesh.layout_bytes(tpu_mesh.XXL, tokens, layout) / GB,
        "forward_compute_ms": forward.compute * 1e3,
        "forward_comm_ms": forward.communication() * 1e3,
        "backward_compute_ms": backward.compute * 1e3,
        "backward_comm_ms": backward.communication() * 1e3,
        "bound_from_per_device": _or(tpu_mesh.compute_bound_tokens(tpu_mesh.XXL, layout, tpu_mesh.TPU_V5P), "never"),
    }


def _or(number: float, word: str) -> float | str:
    """Replace infinity, which JSON cannot represent, by a word."""
    return number if math.isfinite(number) else word
