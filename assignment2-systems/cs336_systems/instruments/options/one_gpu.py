"""Options of the commands that measure a training step, or attention alone, on one device."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from cs336_systems.instruments.options.common import Measurement, StepGrid
from cs336_systems.theory.activations import CheckpointStrategy
from cs336_systems.training.choices import Mode, Pass, Precision
from cs336_systems.training.options import (
    Attention,
    Attentions,
    Loss,
    Optimizer,
    Optimizers,
    Size,
    Sizes,
    StepPrecision,
    StepPrecisions,
    gpu_or_cpu,
)

#: Attention alone is compiled as a whole or not at all.
AttentionMode = Literal["eager", "compiled"]


@dataclass(frozen=True)
class BenchStep(StepGrid):
    """Time the passes of a training step over a grid of models and ways to run them."""

    passes: tuple[Pass, ...] = ("forward", "forward-backward", "full")
    """inference: logits without autograd; forward: logits and loss; full: with the optimizer's step."""
    modes: tuple[Mode, ...] = ("eager",)
    """compiled-model puts the model and the loss through torch.compile, again for every row; compiled-blocks each block
    and the loss: seconds, where a large model takes minutes."""
    optimizers: Optimizers = ("basics",)
    warmups: tuple[int, ...] = (5,)
    """Steps before the clock starts; with 0 the first timed step is that of a fresh model."""
    steps: int = 10
    """Steps that are timed."""
    name: str = "bench_step"
    instrument: ClassVar[str] = "step"


@dataclass(frozen=True)
class Profile(Measurement):
    """Show where a training step spends its time: kernels (on a CPU: operators), their kinds, ranges, and a trace."""

    size: Size = gpu_or_cpu("small", "tiny")
    context: int = gpu_or_cpu(512, 128)
    """Context length in tokens."""
    batch_size: int = 4
    """Sequences per step."""
    attention: Attention = "plain"
    precision: StepPrecision = "float32"
    mode: Mode = "eager"
    """compiled-model puts the model and the loss through torch.compile, compiled-blocks each block and the loss; the
    parts of attention then have no ranges."""
    optimizer: Optimizer = "basics"
    loss: Loss = "plain"
    warmup: int = 5
    """Steps before the profiler starts."""
    steps: int = 3
    """Steps that are profiled; times are means over them."""
    under_nsys: bool = False
    """Leave torch.profiler out and mark the steps for `nsys profile --capture-range=cudaProfilerApi`."""
    name: str = "profile"
    """Results are written to <out>/<name>.json and <out>/<name>.trace.json.gz."""
    instrument: ClassVar[str] = "profile"


@dataclass(frozen=True)
class Memory(StepGrid):
    """Measure peak memory over a grid of models, and draw its contents over time. Needs an NVIDIA GPU."""

    sizes: Sizes = ("2.7B",)
    contexts: tuple[int, ...] = (128, 256, 512)
    precisions: StepPrecisions = ("float32", "bfloat16")
    passes: tuple[Pass, ...] = ("inference", "full")
    """inference: a forward pass without autograd; forward: with it; full: with the optimizer's step."""
    snapshot: bool = False
    """Also record every allocation of one step of each case and draw it: <out>/<name>_<case>.pickle, for
    https://pytorch.org/memory_viz, and <out>/<name>_<case>.png."""
    name: str = "memory"
    instrument: ClassVar[str] = "memory"


@dataclass(frozen=True)
class Checkpointing(StepGrid):
    """Compare gradient checkpointing strategies: the memory they keep, their peak, and their time."""

    sizes: Sizes = gpu_or_cpu(("xl",), ("tiny",))
    contexts: tuple[int, ...] = gpu_or_cpu((512,), (128,))
    strategies: tuple[CheckpointStrategy, ...] = ("none", "group", "block", "nested")
    """Checkpoint nothing, groups of blocks, each block, or halves of halves."""
    group_size: int | None = None
    """Blocks per group. Default: the square root of the number of blocks."""
    warmup: int = 2
    """Steps before the clock starts."""
    steps: int = 5
    """Forward and backward passes that are timed."""
    name: str = "checkpointing"
    instrument: ClassVar[str] = "checkpointing"


@dataclass(frozen=True)
class MixedPrecision(Measurement):
    """Show where half precision loses accuracy, and the dtypes of a small model under autocast; takes a second."""

    name: str = "mixed_precision"
    instrument: ClassVar[str] = "mixed_precision"


@dataclass(frozen=True)
class BenchAttention(Measurement):
    """Time causal attention alone, and measure the memory that it holds for its backward pass."""

    attentions: Attentions = ("plain",)
    modes: tuple[AttentionMode, ...] = gpu_or_cpu(("eager", "compiled"), ("eager",))
    """The functions as they are, or under torch.compile."""
    dtypes: tuple[Precision, ...] = ("float32",)
    """Precisions of queries, keys and values."""
    dims: tuple[int, ...] = gpu_or_cpu((16, 32, 64, 128), (16, 64))
    """Widths of a head."""
    seqs: tuple[int, ...] = gpu_or_cpu((256, 1024, 4096, 8192, 16384), (128, 256))
    """Sequence lengths."""
    batch_size: int = 8
    """Sequences at a time, of one head each."""
    warmup: int = 5
    """Passes before the clock starts."""
    steps: int = gpu_or_cpu(100, 20)
    """Forward and backward passes that are timed."""
    name: str = "bench_attention"
    instrument: ClassVar[str] = "attention"


@dataclass(frozen=True)
class BenchFlash(Measurement):
    """Time attention kernels over sequence lengths, head widths and dtypes; batch 1, causal."""

    attentions: Attentions = gpu_or_cpu(
        ("plain", "flash", "sdpa-flash", "sdpa-cudnn", "sdpa-efficient", "flex"),
        ("plain", "flash-pytorch", "sdpa-flash"),
    )
    dtypes: tuple[Precision, ...] = ("bfloat16", "float32")
    """Precisions of queries, keys and values."""
    dims: tuple[int, ...] = gpu_or_cpu((16, 32, 64, 128), (64,))
    """Widths of a head."""
    seqs: tuple[int, ...] = gpu_or_cpu(tuple(2**power for power in range(7, 17)), (128, 256))
    """Sequence lengths."""
    heads: int = 1
    """Heads. The leaderboard has 16."""
    rep_ms: int = gpu_or_cpu(100, 20)
    """How long each median is measured, in ms."""
    name: str = "bench_flash"
    instrument: ClassVar[str] = "flash"


@dataclass(frozen=True)
class Leaderboard2025(Measurement):
    """Time our FlashAttention at the leaderboard's shape, along with PyTorch's kernels and the device's ceilings."""

    heads: int = 16
    """Heads."""
    seq: int = 16_384
    """Sequence length."""
    dim: int = 64
    """Width of a head."""
    peers: Attentions = ("sdpa-flash", "sdpa-cudnn", "flex")
    rounds: int = 3
    """Rounds; each times everything once."""
    rep_ms: int = 1000
    """How long each median of a round is measured, in ms."""
    name: str = "leaderboard_2025"
    instrument: ClassVar[str] = "leaderboard_2025"
