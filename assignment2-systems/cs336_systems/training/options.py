"""The options of `train` and `consolidate`. They are read without importing torch, so that `--help` is quick."""

import os
import sys
from ctypes import CDLL, byref, c_int
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import tyro

from cs336_basics.cli import TrainPreset
from cs336_systems.training.choices import AttentionName, LossName, OptimizerName, Precision, SizeName, StrategyName

T = TypeVar("T")

_ATTENTION = tyro.conf.arg(
    help="plain: Assignment 1's. flash: our Triton kernels, for a GPU. flash-pytorch: their reference. sdpa-*, flex: "
    "PyTorch's."
)
_OPTIMIZER = tyro.conf.arg(help="basics: Assignment 1's AdamW. fused: the same in one kernel. torch: PyTorch's.")
_LOSS = tyro.conf.arg(help="plain: logits, then cross-entropy. fused: both in our kernel. torch: both by PyTorch.")
_PRECISION = tyro.conf.arg(
    help="bfloat16: under autocast, or, where weights are sharded, with weights that are cast before they are sent; "
    "parameters stay float32."
)
_SIZE = tyro.conf.arg(help="Size of the model. Choose tiny to try the command without a GPU.")
#: Options that several commands have, each with its help: one choice, or several to compare.
Attention = Annotated[AttentionName, _ATTENTION]
Attentions = Annotated[tuple[AttentionName, ...], _ATTENTION]
Optimizer = Annotated[OptimizerName, _OPTIMIZER]
Optimizers = Annotated[tuple[OptimizerName, ...], _OPTIMIZER]
Loss = Annotated[LossName, _LOSS]
Losses = Annotated[tuple[LossName, ...], _LOSS]
StepPrecision = Annotated[Precision, _PRECISION]
StepPrecisions = Annotated[tuple[Precision, ...], _PRECISION]
Size = Annotated[SizeName, _SIZE]
Sizes = Annotated[tuple[SizeName, ...], _SIZE]


def gpu_count() -> int:
    """Count the GPUs that PyTorch can use; before torch is imported, those that the NVIDIA driver reports."""
    if torch := sys.modules.get("torch"):
        return torch.cuda.device_count() if torch.cuda.is_available() else 0
    count = c_int()
    try:
        if version("torch").endswith("+cpu") or os.environ.get("CUDA_VISIBLE_DEVICES") == "":
            return 0
        driver = CDLL("libcuda.so.1")
        return count.value if driver.cuInit(0) == 0 and driver.cuDeviceGetCount(byref(count)) == 0 else 0
    except (OSError, AttributeError, PackageNotFoundError):
        return 0


def has_gpu() -> bool:
    """Return whether there is a GPU; see `gpu_count`."""
    torch = sys.modules.get("torch")
    return torch.cuda.is_available() if torch else gpu_count() > 0


def gpu_or_cpu(gpu: T, cpu: T) -> T:
    """Make a field whose default depends on the machine: one for a GPU, and one that a CPU can do in seconds."""
    return field(default_factory=lambda: gpu if has_gpu() else cpu)


@dataclass(frozen=True)
class Train:
    """Train a model as `cs336-basics train` does, on this device or on all ranks that torchrun starts."""

    config: TrainPreset
    strategy: StrategyName | Literal["single", "auto"] = "auto"
    """single: one device. ddp, ddp-bucketed: average gradients. ddp+sharded-optimizer, fsdp, torch-fsdp2: also shard
    the training state. auto: ddp-bucketed under torchrun, otherwise single."""
    attention: Attention = gpu_or_cpu("flash", "plain")
    fused_optimizer: bool = gpu_or_cpu(True, False)
    """Run AdamW as one kernel instead of Assignment 1's; needs a GPU. Does not apply to torch-fsdp2 or inside Muon."""
    bucket_size_mib: Annotated[float | None, tyro.conf.arg(aliases=["--bucket-size-mb"])] = None
    """MiB (2^20 bytes) of gradients in a message of ddp-bucketed and ddp+sharded-optimizer. Default: buckets that
    shrink towards the end of the backward pass."""
    backend: Literal["auto", "nccl", "gloo"] = "auto"
    """nccl between GPUs; gloo between CPUs, or between GPUs through host memory, where ranks may share a GPU."""
    timeout_s: float = 600.0
    """Seconds that a rank waits for the others before it gives up."""

    def execute(self) -> None:
        from cs336_systems.training.train import train_with_strategy

        train_with_strategy(self)


@dataclass(frozen=True)
class Consolidate:
    """Convert a checkpoint that several ranks have written to one file, which `cs336-basics generate` can read."""

    run_dir: Annotated[Path, tyro.conf.arg(aliases=["--run"])]
    """Folder of the run."""
    checkpoint: Path | None = None
    """Checkpoint to convert. Default: the latest of the run."""
    output: Path | None = None
    """File to write. Default: <run_dir>/consolidated.pt."""

    def execute(self) -> None:
        from cs336_systems.training.train import consolidate

        consolidate(self)
