"""How long the passes of a training step take: the course's benchmarking_script."""

import statistics
from dataclasses import dataclass

import torch

from cs336_basics import accounting
from cs336_basics.strategy import resolve_device
from cs336_systems.measure import Row, check_options, run_grid, show, times_ms
from cs336_systems.training_step import OptimizerName, Pass, StepConfig, StepGrid, StepMode, TrainingStep


@dataclass(frozen=True)
class BenchStep(StepGrid):
    """Time the passes of a training step over a grid of models and ways to run them."""

    passes: tuple[Pass, ...] = ("forward", "forward-backward", "full")
    """inference: logits without autograd; forward: logits and loss; full: with the optimizer's step."""
    modes: tuple[StepMode, ...] = ("eager",)
    """compiled puts the model and the loss through torch.compile, anew for every row; compiled-blocks each block and
    the loss: seconds, where a large model takes minutes."""
    optimizers: tuple[OptimizerName, ...] = ("basics",)
    """Assignment 1's AdamW, or the fused one."""
    warmups: tuple[int, ...] = (5,)
    """Steps before the clock starts; with 0 the first step is that of a fresh model."""
    steps: int = 10
    """Steps that are timed."""
    name: str = "bench_step"

    def execute(self) -> None:
        check_options(self, "steps")
        check_options(self, "warmups", least=0)
        device = resolve_device(self.device)
        axes = {"optimizer": self.optimizers, "mode": self.modes, "pass": self.passes, "warmup": self.warmups}
        cases = self.cases(device, **axes)
        common = {"batch_size": self.batch_size, "steps": self.steps}
        file = self.result_file("time of a training step's passes", device, **common)

        def measure(case: Row) -> Row:
            return time_step(self.step_config(case, device), case["pass"], case["warmup"], self.steps)

        rows = run_grid(cases, measure, file)
        show("training step", rows, settings=list(cases[0]), common=common)
        file.announce()


def time_step(config: StepConfig, which: Pass, warmup: int, steps: int) -> Row:
    """Times of a pass in milliseconds, and the rates that the median gives.

    The model is new, and a compiled one's code with it (except what Inductor keeps on disk), so that without
    warm-up the first step pays for everything that a first step pays for.
    """
    if config.mode != "eager":
        torch.compiler.reset()
    step = TrainingStep(config)
    times = times_ms(lambda: step.run(which), config.device, warmup, steps)
    median = statistics.median(times)
    forward = accounting.forward_flops(config.model, config.batch_size)
    flops = forward if which in ("inference", "forward") else 3 * forward
    return {
        "mean_ms": statistics.fmean(times),
        "std_ms": statistics.stdev(times) if steps > 1 else 0.0,
        "median_ms": median,
        "tok/s": config.tokens / median * 1e3,
        "TFLOP/s": flops / median / 1e9,
        "times_ms": [round(taken, 4) for taken in times],
    }
