"""What it costs the host to start the all-reduces of a model's gradients, while it has nothing else to do.

    python -m benchmarks.launch_cost [--size xl] [--processes 2] [--out results]

For buckets of several sizes, and each bucket as the list of its gradients, which is how `BucketedDataParallel` sends
it, or as one flat tensor.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any, get_args

import torch
import torch.distributed as dist

from cs336_basics.model import BasicsTransformerLM
from cs336_systems.measure import show, synchronize, write_result
from cs336_systems.models import SizeName, model_config
from cs336_systems.parallel.bucketed import fill_buckets
from cs336_systems.parallel.collectives import AllReduceMean, flatten
from cs336_systems.parallel.process_group import Process, device_of_process, run_processes
from cs336_systems.parallel_step import BucketSize

#: MB of 2^20 bytes; auto: buckets that shrink; None: one for all.
BUCKETS: tuple[BucketSize | None, ...] = ("auto", 100, 250, 500, 1000, None)


def launch_costs(process: Process, size: SizeName, rounds: int) -> list[dict[str, Any]]:
    """Medians over the rounds of the time for starting all messages of a step, in this process."""
    shape = model_config(size, 16)
    parameters = list(BasicsTransformerLM.from_config(shape, device=process.device).parameters())
    rows = []
    for bucket in BUCKETS:
        lists = [[torch.zeros_like(x) for x in group] for group in fill_buckets(parameters, bucket)]
        for sent_as, messages in (("list", lists), ("flat", [[flatten(gradients)] for gradients in lists])):
            times = [start_all(messages, process) for _ in range(rounds + 2)][2:]
            rows.append({
                "bucket_MB": "all" if bucket is None else bucket, "as": sent_as, "messages": len(messages),
                "tensors": sum(map(len, messages)), "launch_ms": statistics.median(times),
            })  # fmt: skip
    return rows


def start_all(messages: list[list[torch.Tensor]], process: Process) -> float:
    """Milliseconds in which the host starts them, from a moment at which all processes are idle."""
    synchronize(process.device)
    dist.barrier()
    synchronize(process.device)
    started = time.perf_counter()
    under_way = [AllReduceMean(tensors) for tensors in messages]
    taken = (time.perf_counter() - started) * 1e3
    for message in under_way:
        message.wait()
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=get_args(SizeName), default="xl")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("results"))
    arguments = parser.parse_args()
    device = device_of_process("auto", 0)
    rows = run_processes(
        launch_costs, arguments.processes, arguments.size, arguments.rounds, device=device.type, timeout_s=600
    )[0]
    what = f"starting the all-reduces of all gradients of {arguments.size}: the host's time, medians"
    show(what, rows)
    write_result(arguments.out, "bench_ddp_launch", what, rows, device, processes=arguments.processes)


if __name__ == "__main__":
    main()
