"""Options of the commands that measure several ranks."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal, get_args

import tyro

from cs336_systems.instruments.options.common import Measurement, RanksMeasurement
from cs336_systems.training.choices import BucketSize, StateSharding
from cs336_systems.training.options import Optimizer, Optimizers, Size, gpu_count, gpu_or_cpu

#: gloo: tensors on the CPU. nccl: tensors on GPUs, one for each rank.
LinkBackend = Literal["gloo", "nccl"]
#: The ranks run each block eagerly, or compiled. A model compiled as a whole has nothing to overlap.
BlockMode = Literal["eager", "compiled-blocks"]
#: Containers that `bench-ddp` compares. bucketed, torch-ddp: once for each size of a bucket.
DdpVariant = Literal["none", "naive", "flat", "overlapped", "bucketed", "torch-ddp"]
FsdpVariant = Literal["bucketed", "fsdp", "fsdp-linear", "fully-shard"]
Checkpointed = Literal["none", "block"]
Contestant = Literal["ours", "torch"]
ScalingPart = Literal["all-reduce", "weak", "strong", "optimizer-state", "8B"]
ScalingVariant = Literal["none", "bucketed", "torch-ddp", "fsdp", "fully-shard"]


@dataclass(frozen=True)
class BenchAllreduce(Measurement):
    """Time the all-reduce of float32 tensors over sizes, numbers of ranks and backends."""

    backends: tuple[LinkBackend, ...] = ()
    """gloo: tensors on the CPU. nccl: tensors on GPUs, one per rank. Default: gloo, and with GPUs also nccl."""
    processes: tuple[int, ...] = (2, 4, 6)
    """Numbers of ranks."""
    sizes_mb: tuple[float, ...] = gpu_or_cpu((1, 10, 100, 1000), (1, 10, 100))
    """Sizes of the tensor on each rank, in MB (10^6 bytes)."""
    warmup: int = 2
    """All-reduces of each size before the clock starts."""
    rep_ms: int = 1000
    """About how long each size is timed, in ms; at least 3 all-reduces."""
    timeout_s: float = 600.0
    """A set of ranks that has not finished after this many seconds is killed."""
    name: str = "bench_allreduce"
    instrument: ClassVar[str] = "all_reduce"


@dataclass(frozen=True)
class BenchDdp(RanksMeasurement):
    """Time a training step on several ranks for each way to average gradients, and show what overlaps."""

    variants: tuple[DdpVariant, ...] = get_args(DdpVariant)
    """none: no communication, the floor. naive, flat: after the backward pass. overlapped, bucketed: during it.
    torch-ddp: PyTorch's container."""
    bucket_mib: Annotated[tuple[BucketSize, ...], tyro.conf.arg(aliases=["--bucket-mb"])] = gpu_or_cpu(
        ("auto", 1, 10, 100, 1000), ("auto", 0.1, 1)
    )
    """Bucket sizes of the bucketed variant, in MiB (2^20 bytes); auto is its default, buckets that shrink."""
    torch_bucket_mib: Annotated[tuple[float, ...], tyro.conf.arg(aliases=["--torch-bucket-mb"])] = gpu_or_cpu(
        (25, 100, 1000), (25,)
    )
    """Bucket sizes of torch-ddp in MiB; its default is 25."""
    mode: BlockMode = "eager"
    """compiled-blocks puts each block of the model, and the loss, through torch.compile."""
    optimizer: Optimizer = "basics"
    rounds: int = gpu_or_cpu(2, 3)
    """Rounds; in each of them every variant is timed once, with a new model."""
    trace: bool = False
    """Also profile one step of each variant: shares of hidden communication, and a picture, <out>/<name>.png."""
    keep_traces: bool = False
    """Keep the profiler's traces of --trace: <out>/<name>_<variant>.trace.json.gz."""
    name: str = "bench_ddp"
    instrument: ClassVar[str] = "ddp"


@dataclass(frozen=True)
class BenchSharding(RanksMeasurement):
    """Measure memory and time of a training step with and without sharding of the optimizer's state."""

    optimizers: Optimizers = ("basics", "torch")
    shardings: tuple[StateSharding, ...] = ("none", "ours", "torch")
    """none: each rank keeps all state. ours: ShardedOptimizer. torch: ZeroRedundancyOptimizer."""
    name: str = "bench_sharding"
    instrument: ClassVar[str] = "sharding"


@dataclass(frozen=True)
class BenchFsdp(RanksMeasurement):
    """Measure a training step with sharded weights, ours and PyTorch's, in comparison with DDP."""

    variants: tuple[FsdpVariant, ...] = ("bucketed", "fsdp", "fsdp-linear", "fully-shard")
    """bucketed: DDP, nothing sharded. fsdp: our FSDP, a block is a unit. fsdp-linear: our FSDP, every Linear is one.
    fully-shard: PyTorch's FSDP2, a block is a unit."""
    modes: tuple[BlockMode, ...] = ("eager",)
    """compiled-blocks puts each block of the model, and the loss, through torch.compile."""
    checkpointing: tuple[Checkpointed, ...] = ("none", "block")
    """block: each block's forward pass is repeated in the backward pass, and its activations are not kept."""
    optimizer: Optimizer = "basics"
    name: str = "bench_fsdp"
    instrument: ClassVar[str] = "fsdp"


def _up_to_all_gpus() -> tuple[int, ...]:
    """Return 1, 2, 4, … up to the number of GPUs; without a GPU, 1 and 2."""
    return tuple(2**k for k in range((gpu_count() or 2).bit_length()))


@dataclass(frozen=True)
class Scaling(Measurement):
    """Measure how all-reduce, DDP, FSDP and the 8B step scale over the GPUs of this machine; resumes where it ended."""

    parts: tuple[ScalingPart, ...] = get_args(ScalingPart)
    """Parts to measure, in this order."""
    processes: tuple[int, ...] = field(default_factory=_up_to_all_gpus)
    """Numbers of ranks, each with a GPU of its own. Default: 1, 2, 4, … up to all GPUs; without a GPU, 1 and 2."""
    all_reduce_processes: tuple[int, ...] = ()
    """Numbers of ranks of the all-reduce. Default: those above from 2 on, and 6 if there are 6 GPUs."""
    sizes_mb: tuple[float, ...] = gpu_or_cpu((1, 10, 100, 1000), (0.1, 1))
    """Sizes of the all-reduce's tensors, in MB (10^6 bytes)."""
    size: Size = gpu_or_cpu("xl", "tiny")
    context: int = gpu_or_cpu(512, 32)
    """Tokens in a sequence."""
    weak_batch: int = 4
    """Sequences of each rank where the batch grows with the number of ranks."""
    strong_batch: int = 16
    """Sequences of all ranks together where it does not; a multiple of each number of ranks."""
    variants: tuple[ScalingVariant, ...] = get_args(ScalingVariant)
    """none: no communication, the floor, and the only variant of a single rank."""
    mode: BlockMode = gpu_or_cpu("compiled-blocks", "eager")
    """compiled-blocks puts each block of the model, and the loss, through torch.compile."""
    optimizer: Optimizer = gpu_or_cpu("fused", "basics")
    warmup: int = 3
    """Steps before the clock starts."""
    steps: int = 8
    """Steps that are timed."""
    contestants: tuple[Contestant, ...] = gpu_or_cpu(("ours", "torch"), ("torch",))
    """Contestants that run the 8B step, from 2 ranks on."""
    minutes: float = 8.0
    """Start no set that is unlikely to finish within this time, and end one that does not."""
    name: str = "scaling"
    instrument: ClassVar[str] = "scaling"


@dataclass(frozen=True)
class Leaderboard2026(Measurement):
    """Time one training step of an 8B model on two GPUs, ours and PyTorch's.

    On one GPU the defaults take 135 GB, of which 130 GB are weights, gradients and moments, 16 bytes per parameter.
    Choose fewer layers if that is too much; 16 layers take 77 GB.
    """

    vocab: int = gpu_or_cpu(151_936, 512)
    """Number of token ids."""
    context: int = gpu_or_cpu(32_768, 64)
    """Tokens in a sequence."""
    d_model: int = gpu_or_cpu(4096, 64)
    """Width of the model."""
    d_ff: int = gpu_or_cpu(11_008, 192)
    """Inner width of the feed-forward network."""
    layers: int = gpu_or_cpu(34, 2)
    """Number of blocks."""
    heads: int = gpu_or_cpu(32, 4)
    """Attention heads."""
    processes: int = field(default_factory=lambda: gpu_count() or 2)
    """Number of ranks, each with a GPU of its own. Default: the number of GPUs; without a GPU, 2 on the CPU."""
    batch_size: int = 1
    """Sequences per rank and step."""
    contestants: tuple[Contestant, ...] = ("ours", "torch")
    """Contestants, in this order."""
    mode: BlockMode = gpu_or_cpu("compiled-blocks", "eager")
    """compiled-blocks puts each block and the final norm through torch.compile. PyTorch's contestant also compiles
    head and loss, whose float32 logits otherwise take 20 GB and more."""
    warmup: int = 2
    """Steps before the clock starts; the first one compiles."""
    steps: int = 4
    """Steps that are timed."""
    timeout_s: float = 1200.0
    """Seconds for all ranks of a contestant together."""
    name: str = "leaderboard_2026"
    instrument: ClassVar[str] = "leaderboard_2026"
