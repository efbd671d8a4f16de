"""How long the passes of a training step take: the course's benchmarking_script."""

import itertools
import statistics
import time
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from cs336_basics import accounting
from cs336_systems.attention import AttentionName
from cs336_systems.measure import Row, or_out_of_memory, synchronize, write_result
from cs336_systems.training_step import (
    LossName,
    OptimizerName,
    Pass,
    SizeName,
    StepConfig,
    TrainingStep,
    device_named,
    model_config,
    show_grid,
)

SETTINGS = ("size", "context", "attention", "pass", "warmup")


@dataclass(frozen=True)
class BenchStep:
    """Time the passes of a training step over sizes, contexts, attentions and numbers of warm-up steps."""

    sizes: tuple[SizeName, ...] = ("small",)
    """Model sizes."""
    contexts: tuple[int, ...] = (128, 256, 512, 1024)
    """Context lengths in tokens."""
    passes: tuple[Pass, ...] = ("forward", "forward-backward", "full")
    """inference: logits without autograd; forward: logits and loss; full: with the optimizer's step."""
    attention: tuple[AttentionName, ...] = ("plain",)
    """Attention implementations."""
    warmup: tuple[int, ...] = (5,)
    """Steps before the clock starts; with 0 the first step is that of a fresh model."""
    steps: int = 10
    """Steps that are timed."""
    batch_size: int = 4
    """Sequences per step."""
    bf16: bool = False
    """Run forward and backward pass under bfloat16 autocast."""
    compile: bool = False
    """Put the model and the loss through torch.compile, anew for every row."""
    optimizer: OptimizerName = "basics"
    """Assignment 1's AdamW, or the fused one."""
    loss: LossName = "plain"
    """Logits and cross-entropy, or both fused."""
    device: str = "auto"
    """cpu, cuda, or auto for a GPU if there is one."""
    name: str = "bench_step"
    """The result is written to <out>/<name>.json."""
    out: Path = Path("results")
    """Folder for the result."""

    def execute(self) -> None:
        if self.steps < 1 or min(self.warmup, default=0) < 0:
            raise ValueError(f"{self.steps} steps after {self.warmup} warm-up steps: time at least 1 step after 0")
        device = device_named(self.device)
        cases = list(itertools.product(self.sizes, self.contexts, self.attention, self.passes, self.warmup))
        configs = [
            StepConfig(
                model_config(size, context), device, self.batch_size, attention,
                self.bf16, self.compile, self.optimizer, self.loss,
            )
            for size, context, attention, _, _ in cases
        ]  # fmt: skip
        common = {
            "batch_size": self.batch_size, "precision": "bf16" if self.bf16 else "fp32", "compile": self.compile,
            "optimizer": self.optimizer, "loss": self.loss, "steps": self.steps,
        }  # fmt: skip

        what = "time of a training step's passes"
        rows: list[Row] = []
        console = Console(stderr=True)
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task("", total=len(cases))
            for case, config in zip(cases, configs):
                progress.update(task, description=" ".join(map(str, case)))
                _, _, _, which, warmup = case
                keys: Row = dict(zip(SETTINGS, case))
                rows.append(keys | or_out_of_memory(partial(time_step, config, which, warmup, self.steps)))
                with redirect_stdout(None):  # after every row: an interrupted grid keeps what it has measured
                    write_result(self.out, self.name, what, rows, device, **common)
                progress.advance(task)
        show_grid("training step", common, rows, SETTINGS)
        write_result(self.out, self.name, what, rows, device, **common)


def time_step(config: StepConfig, which: Pass, warmup: int, steps: int) -> Row:
    """Times of a pass in milliseconds, and the rates that the median gives.

    The model is new, and with `compile` so is its compiled code (except what Inductor keeps on disk), so that
    without warm-up the first step pays for everything that a first step pays for. Every step is timed on the
    host between two synchronisations.
    """
    if config.compile:
        torch.compiler.reset()
    step = TrainingStep(config)
    for _ in range(warmup):
        step.run(which)
    times = []
    for _ in range(steps):
        synchronize(config.device)
        started = time.perf_counter()
        step.run(which)
        synchronize(config.device)
        times.append((time.perf_counter() - started) * 1e3)
    median = statistics.median(times)
    forward = accounting.forward_flops(config.model, config.batch_size)
    flops = forward if which in ("inference", "forward") else 3 * forward
    return {
        "mean_ms": statistics.fmean(times),
        "std_ms": statistics.stdev(times) if steps > 1 else 0.0,
        "median_ms": median,
        "min_ms": min(times),
        "tok/s": round(config.tokens / median * 1e3),
        "TFLOP/s": flops / median / 1e9,
        "times_ms": [round(taken, 4) for taken in times],
    }
