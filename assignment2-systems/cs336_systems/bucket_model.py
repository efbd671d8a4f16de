"""What bucketed DDP adds to a step: the course's model, and one with what it leaves out, fitted to measurements.

The course's model is s/(n w) + n o for n equal buckets of s bytes in all (`accounting.ddp_overhead`). Buckets of real
gradients are not equal: there are never more than there are gradients, and the last one holds what is left. And kernels
slow down while NCCL's run beside them.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from cs336_basics.model import BasicsTransformerLM
from cs336_systems.accounting import optimal_bucket_bytes
from cs336_systems.measure import Measurement, show
from cs336_systems.models import model_config
from cs336_systems.parallel.bucketed import MB, fill_buckets


@dataclass(frozen=True)
class BucketFit:
    """slow-down + last message / w + messages · o, for the sizes of buckets that were measured."""

    bucket_mb: list[float]
    messages: list[int]
    last_bytes: list[int]
    measured_ms: list[float]
    """Step time beyond that without communication."""
    total_bytes: int
    """s: of all gradients."""
    bytes_per_second: float
    """w, measured with the largest all-reduce."""
    call_ms: float
    """o, fitted."""
    slowdown_ms: float
    """Fitted."""

    def predicted_ms(self) -> list[float]:
        """The fitted model's overhead for each size."""
        return [
            self.slowdown_ms + last / self.bytes_per_second * 1e3 + messages * self.call_ms
            for messages, last in zip(self.messages, self.last_bytes)
        ]

    def optimum_mb(self) -> float:
        """The best size by the course's model, with the fitted o."""
        return optimal_bucket_bytes(self.total_bytes, self.bytes_per_second, self.call_ms / 1e3) / MB


def fit(ddp: dict[str, Any], all_reduce: dict[str, Any]) -> BucketFit:
    """Fit o and the slow-down by least squares.

    Args:
        ddp: a result of `bench-ddp` with the variant "bucketed" at several sizes.
        all_reduce: a result of `bench-allreduce`.

    Raises:
        ValueError: there are fewer than two sizes.
    """
    rows = [row for row in ddp["rows"] if row["variant"] == "bucketed" and row["bucket_MB"] != "auto"]
    if len(rows) < 2:
        raise ValueError(f"the result of bench-ddp has {len(rows)} sizes of buckets; two unknowns need at least 2")
    parameters = gradients_of(ddp)
    buckets = [fill_buckets(parameters, row["bucket_MB"]) for row in rows]
    messages = [len(filled) for filled in buckets]
    last = [sum(parameter.nbytes for parameter in filled[-1]) for filled in buckets]
    bandwidth = max(all_reduce["rows"], key=lambda row: row["size_MB"])["S/t_GB/s"] * 1e9
    measured = [row["exposed_ms"] for row in rows]
    rest = np.array(measured) - np.array(last) / bandwidth * 1e3
    (call, slowdown), *_ = np.linalg.lstsq(np.stack([messages, np.ones(len(rows))], axis=1), rest, rcond=None)
    total = sum(parameter.nbytes for parameter in parameters)
    sizes = [row["bucket_MB"] for row in rows]
    return BucketFit(sizes, messages, last, measured, total, bandwidth, float(call), float(slowdown))


def gradients_of(ddp: dict[str, Any]) -> list[nn.Parameter]:
    """The parameters of the model that was trained, without memory."""
    with torch.device("meta"):
        return list(BasicsTransformerLM.from_config(model_config(ddp["size"], ddp["context"])).parameters())


@dataclass(frozen=True)
class FitBuckets(Measurement):
    """Fit the overhead model of bucketed DDP to results of bench-ddp and bench-allreduce."""

    ddp: Path = Path("results/bench_ddp_fixed_buckets.json")
    """A result of bench-ddp with several --bucket-mb."""
    all_reduce: Path = Path("results/bench_allreduce_nccl.json")
    """A result of bench-allreduce with as many processes on the same devices."""
    name: str = "bucket_fit"

    def execute(self) -> None:
        ddp, all_reduce = (json.loads(path.read_text(encoding="utf-8")) for path in (self.ddp, self.all_reduce))
        fitted = fit(ddp, all_reduce)
        file = self.result_file("overhead model of bucketed DDP", torch.device("cpu"), of=ddp["device"])
        last_mb = [last / MB for last in fitted.last_bytes]
        names = ("bucket_MB", "messages", "last_bucket_MB", "measured_ms", "predicted_ms")
        columns = (fitted.bucket_mb, fitted.messages, last_mb, fitted.measured_ms, fitted.predicted_ms())
        rows = [dict(zip(names, row)) for row in zip(*columns)]
        unknowns = {key: asdict(fitted)[key] for key in ("total_bytes", "bytes_per_second", "call_ms", "slowdown_ms")}
        unknowns["optimum_MB"] = fitted.optimum_mb()
        unknowns["shrinking_messages"] = len(fill_buckets(gradients_of(ddp), "auto"))
        file.write(rows, **unknowns)
        show("overhead beyond no communication", rows)
        show("the model's numbers; the best bucket by the course's; messages of buckets that shrink", [unknowns])
        file.announce()
