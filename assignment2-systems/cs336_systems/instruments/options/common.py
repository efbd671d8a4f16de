"""Options that several commands share."""

from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import ClassVar

from cs336_systems.training.options import (
    Attention,
    Attentions,
    Losses,
    Size,
    Sizes,
    StepPrecision,
    StepPrecisions,
    gpu_count,
    gpu_or_cpu,
)


@dataclass(frozen=True)
class Measurement:
    """The options of every command."""

    device: str = gpu_or_cpu("cuda", "cpu")
    """cpu, cuda, or one GPU, for example cuda:1. Default: a GPU if there is one."""
    name: str = "measurement"
    """The result is written to <out>/<name>.json."""
    out: Path = Path("results")
    """Folder for the result."""
    instrument: ClassVar[str]
    """The module that measures, whose function `run` takes these options."""

    def execute(self) -> None:
        """Run the command, which imports its instrument, and with it torch, only now."""
        import_module(f"cs336_systems.instruments.{self.instrument}").run(self)


@dataclass(frozen=True)
class StepGrid(Measurement):
    """The options of commands that run training steps of several models on one device."""

    sizes: Sizes = gpu_or_cpu(("small",), ("tiny",))
    contexts: tuple[int, ...] = gpu_or_cpu((128, 256, 512, 1024), (64, 128))
    """Context lengths in tokens."""
    attentions: Attentions = ("plain",)
    precisions: StepPrecisions = ("float32",)
    losses: Losses = ("plain",)
    batch_size: int = 4
    """Sequences per step."""


@dataclass(frozen=True)
class RanksMeasurement(Measurement):
    """The options of commands that run training steps on several ranks."""

    processes: int = field(default_factory=lambda: gpu_count() or 2)
    """Number of ranks, each with a GPU of its own. Default: the number of GPUs; without a GPU, 2 on the CPU."""
    size: Size = gpu_or_cpu("xl", "tiny")
    context: int = gpu_or_cpu(512, 128)
    """Context length in tokens."""
    batch_size: int = 4
    """Sequences per step on each rank."""
    attention: Attention = "plain"
    precision: StepPrecision = gpu_or_cpu("bfloat16", "float32")
    warmup: int = 2
    """Steps before the clock starts."""
    steps: int = 5
    """Steps that are timed."""
    timeout_s: float = 1200.0
    """Ranks that have not finished after this many seconds are killed."""


def check_options(command: object, *names: str, least: int = 1) -> None:
    """Raise a ValueError if one of these numbers (or tuples of numbers) of a command is below `least`."""
    for name in names:
        value = getattr(command, name)
        for number in value if isinstance(value, tuple) else (value,):
            if number is not None and number < least:
                raise ValueError(f"--{name.replace('_', '-')} is {number}, but must be at least {least}")
