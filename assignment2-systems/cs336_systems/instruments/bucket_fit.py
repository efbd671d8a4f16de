"""Fit what bucketed DDP adds to a step to measurements: the course's model, and a model with what it leaves out.

The course's model is s/(n w) + n o for n equal buckets of s bytes in total (`theory.collectives.ddp_overhead`). Buckets
of real gradients are not equal: there are never more buckets than gradients, and the last one holds what is left. Also,
kernels slow down while NCCL's kernels run at the same time.
"""

import json
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from cs336_basics.model import BasicsTransformerLM
from cs336_systems.instruments.measure import print_table, result_file
from cs336_systems.instruments.options.on_paper import FitBuckets
from cs336_systems.parallel.overlapped import fill_buckets
from cs336_systems.theory.collectives import optimal_bucket_bytes
from cs336_systems.theory.units import GB, MIB
from cs336_systems.training.choices import model_config


@dataclass(frozen=True)
class BucketFit:
    """The model slow-down + last message / w + messages · o, for the bucket sizes that were measured."""

    bucket_mib: list[float]
    messages: list[int]
    last_bytes: list[int]
    measured_ms: list[float]
    """Step time beyond that without communication."""
    total_bytes: int
    """s: bytes of all gradients."""
    bytes_per_second: float
    """w, measured by the largest all-reduce."""
    call_ms: float
    """o, fitted."""
    slowdown_ms: float
    """Fitted."""

    def predicted_ms(self) -> list[float]:
        """Return the fitted model's overhead for each size."""
        return [
            self.slowdown_ms + last / self.bytes_per_second * 1e3 + messages * self.call_ms
            for messages, last in zip(self.messages, self.last_bytes)
        ]

    def optimum_mib(self) -> float:
        """Return the best size by the course's model, with the fitted o."""
        return optimal_bucket_bytes(self.total_bytes, self.bytes_per_second, self.call_ms / 1e3) / MIB


def fit(ddp: dict[str, Any], all_reduce: dict[str, Any]) -> BucketFit:
    """Fit o and the slow-down by least squares.

    Args:
        ddp: a result of `bench-ddp` with the variant "bucketed" at several sizes.
        all_reduce: a result of `bench-allreduce`.

    Raises:
        ValueError: there are fewer than two bucket sizes.
    """
    rows = [row for row in ddp["rows"] if row["variant"] == "bucketed" and bucket_size(row) != "auto"]
    if len(rows) < 2:
        raise ValueError(f"the result of bench-ddp has {len(rows)} bucket sizes, but two unknowns need at least 2")
    sizes = [bucket_size(row) for row in rows]
    parameters = gradients_of(ddp)
    buckets = [fill_buckets(parameters, size) for size in sizes]
    messages = [len(filled) for filled in buckets]
    last = [sum(parameter.nbytes for parameter in filled[-1]) for filled in buckets]
    bandwidth = max(all_reduce["rows"], key=lambda row: row["size_MB"])["S/t_GB/s"] * GB
    measured = [row["exposed_ms"] for row in rows]
    rest = np.array(measured) - np.array(last) / bandwidth * 1e3
    (call, slowdown), *_ = np.linalg.lstsq(np.stack([messages, np.ones(len(rows))], axis=1), rest, rcond=None)
    total = sum(parameter.nbytes for parameter in parameters)
    return BucketFit(sizes, messages, last, measured, total, bandwidth, float(call), float(slowdown))


def bucket_size(row: dict[str, Any]) -> Any:
    """Return the bucket size of a row in MiB, which older files of results call MB."""
    return row["bucket_MiB"] if "bucket_MiB" in row else row["bucket_MB"]


def gradients_of(ddp: dict[str, Any]) -> list[nn.Parameter]:
    """Return the parameters of the model that was trained, without allocating memory."""
    with torch.device("meta"):
        return list(BasicsTransformerLM.from_config(model_config(ddp["size"], ddp["context"])).parameters())


def run(options: FitBuckets) -> None:
    """Fit the model, print tables and write a file."""
    ddp, all_reduce = (json.loads(path.read_text(encoding="utf-8")) for path in (options.ddp, options.all_reduce))
    fitted = fit(ddp, all_reduce)
    file = result_file(options, "overhead model of bucketed DDP", torch.device("cpu"), of=ddp["device"])
    last_mib = [last / MIB for last in fitted.last_bytes]
    names = ("bucket_MiB", "messages", "last_bucket_MiB", "measured_ms", "predicted_ms")
    columns = (fitted.bucket_mib, fitted.messages, last_mib, fitted.measured_ms, fitted.predicted_ms())
    rows = [dict(zip(names, row)) for row in zip(*columns)]
    unknowns = {key: asdict(fitted)[key] for key in ("total_bytes", "bytes_per_second", "call_ms", "slowdown_ms")}
    unknowns["optimum_MiB"] = fitted.optimum_mib()
    unknowns["shrinking_messages"] = len(fill_buckets(gradients_of(ddp), "auto"))
    file.write(rows, **unknowns)
    print_table("overhead beyond no communication", rows)
    print_table("the fitted constants, the course's best bucket, and the messages of buckets that shrink", [unknowns])
    file.announce()
