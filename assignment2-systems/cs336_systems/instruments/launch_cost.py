"""Time what it costs the host to start the all-reduces of a model's gradients while it has nothing else to do.

This is measured for buckets of several sizes, with each bucket as the list of its gradients, as `BucketedDataParallel`
sends it, and as one flat tensor.
"""

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import tyro

from cs336_basics.model import BasicsTransformerLM
from cs336_systems.instruments.measure import print_table, synchronize, write_result
from cs336_systems.instruments.options.common import Measurement
from cs336_systems.parallel.collectives import AllReduceMean, flatten
from cs336_systems.parallel.overlapped import fill_buckets
from cs336_systems.parallel.process_group import Rank, device_of_rank, run_on_ranks
from cs336_systems.training.choices import BucketSize, SizeName, model_config
from cs336_systems.training.options import gpu_or_cpu

#: Bucket sizes in MiB; auto: buckets that shrink; None: one bucket for all gradients.
BUCKETS: tuple[BucketSize | None, ...] = ("auto", 100, 250, 500, 1000, None)


def launch_costs(rank: Rank, size: SizeName, rounds: int) -> list[dict[str, Any]]:
    """Measure the median time over the rounds for starting all messages of a step on this rank."""
    shape = model_config(size, 16)
    parameters = list(BasicsTransformerLM.from_config(shape, device=rank.device).parameters())
    rows = []
    for bucket in BUCKETS:
        lists = [[torch.zeros_like(x) for x in group] for group in fill_buckets(parameters, bucket)]
        for sent_as, messages in (("list", lists), ("flat", [[flatten(gradients)] for gradients in lists])):
            times = [start_all(messages, rank) for _ in range(rounds + 2)][2:]
            rows.append({
                "bucket_MiB": "all" if bucket is None else bucket, "as": sent_as, "messages": len(messages),
                "tensors": sum(map(len, messages)), "launch_ms": statistics.median(times),
            })  # fmt: skip
    return rows


def start_all(messages: list[list[torch.Tensor]], rank: Rank) -> float:
    """Time in milliseconds how long the host takes to start all messages, from a moment at which all ranks are idle."""
    synchronize(rank.device)
    dist.barrier()
    synchronize(rank.device)
    started = time.perf_counter()
    under_way = [AllReduceMean(tensors) for tensors in messages]
    taken = (time.perf_counter() - started) * 1e3
    for message in under_way:
        message.wait()
    return taken


@dataclass(frozen=True)
class Options(Measurement):
    """Time what it costs the host to start the all-reduces of a model's gradients."""

    size: SizeName = gpu_or_cpu("xl", "tiny")
    """Model size."""
    processes: int = 2
    """Number of ranks."""
    rounds: int = 10
    """Times that each case is measured."""
    name: str = "bench_ddp_launch"


def main(options: Options) -> None:
    """Measure, print a table and write a file."""
    device = device_of_rank(options.device, 0)
    rows = run_on_ranks(
        launch_costs, options.processes, options.size, options.rounds, device=device.type, timeout_s=600
    )[0]
    what = f"starting the all-reduces of all gradients of {options.size}: the host's time, medians"
    print_table(what, rows)
    write_result(options, what, rows, device, processes=options.processes)


if __name__ == "__main__":
    main(tyro.cli(Options))
