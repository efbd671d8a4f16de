"""Time the passes of a training step: the course's benchmarking_script."""

import statistics
from collections.abc import Sequence

import torch

from cs336_basics import accounting
from cs336_basics.strategy import resolve_device
from cs336_systems.instruments.measure import Row, cartesian, print_table, result_file, run_grid, times_ms
from cs336_systems.instruments.options.common import StepGrid, check_options
from cs336_systems.instruments.options.one_gpu import BenchStep
from cs336_systems.training.choices import Pass, model_config
from cs336_systems.training.step import StepConfig, TrainingStep


def run(options: BenchStep) -> None:
    """Measure, print a table and write a file."""
    check_options(options, "steps")
    check_options(options, "warmups", least=0)
    device = resolve_device(options.device)
    axes = {"optimizer": options.optimizers, "mode": options.modes, "pass": options.passes, "warmup": options.warmups}
    cases = step_cases(options, device, **axes)
    common = {"batch_size": options.batch_size, "steps": options.steps}
    file = result_file(options, "time of a training step's passes", device, **common)

    def measure(case: Row) -> Row:
        return time_step(step_of_case(options, case, device), case["pass"], case["warmup"], options.steps)

    rows = run_grid(cases, measure, file)
    print_table("training step", rows, settings=list(cases[0]), common=common)
    file.announce()


def step_cases(options: StepGrid, device: torch.device, **axes: Sequence[object]) -> list[Row]:
    """Return the grid of models and the given axes, for the commands that run training steps on one device.

    Raises:
        ValueError: a case cannot run on this device.
    """
    check_options(options, "contexts", "batch_size")
    cases = cartesian(
        size=options.sizes, context=options.contexts, attention=options.attentions, precision=options.precisions,
        loss=options.losses, **axes,
    )  # fmt: skip
    for case in cases:
        step_of_case(options, case, device)
    return cases


def step_of_case(options: StepGrid, case: Row, device: torch.device) -> StepConfig:
    """Return the training step of a case."""
    return StepConfig(
        model_config(case["size"], case["context"]), device, options.batch_size, case["attention"],
        case["precision"], case.get("mode", "eager"), case.get("optimizer", "basics"), case["loss"],
    )  # fmt: skip


def time_step(config: StepConfig, which: Pass, warmup: int, steps: int) -> Row:
    """Time a pass in milliseconds, and derive rates from the median.

    The model is new, and so is compiled code (except what Inductor keeps on disk), so that without warm-up the first
    step includes everything that a first step costs.
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
