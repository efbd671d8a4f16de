"""Options of the commands that calculate and measure nothing."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from cs336_systems.instruments.options.common import Measurement
from cs336_systems.training.options import Size


@dataclass(frozen=True)
class Accounting(Measurement):
    """Calculate memory, communication and compute-bound batches of parallel training; nothing is measured."""

    memory_tokens: int = 4096
    """Tokens whose activations the XXL model saves for the backward pass."""
    batch_tokens: int = 32_768
    """Tokens of the batch on which the parallel strategies are compared."""
    size: Size = "xl"
    world_size: int = 2
    """Number of ranks for that model."""
    ring: int = 8
    """Ranks in the ring on which two all-reduces are compared."""
    link_gb_per_s: float = 450.0
    """Bandwidth of a GPU's link in one direction; by default NVLink 4 of an H100, as in its data sheet."""
    hop_latency_us: float = 5.0
    """Latency of a hop in the ring (an assumption)."""
    call_overhead_us: float = 30.0
    """Overhead of a call of all-reduce (an assumption)."""
    name: str = "accounting"
    instrument: ClassVar[str] = "accounting"


@dataclass(frozen=True)
class FitBuckets(Measurement):
    """Fit the overhead model of bucketed DDP to results of bench-ddp and bench-allreduce."""

    ddp: Path = Path("results/ddp/bench_ddp_fixed_buckets.json")
    """A result of bench-ddp with several --bucket-mib."""
    all_reduce: Path = Path("results/all_reduce/bench_allreduce_nccl.json")
    """A result of bench-allreduce with the same number of ranks on the same devices."""
    name: str = "bucket_fit"
    instrument: ClassVar[str] = "bucket_fit"
