"""The options of the comparison in `experiments.benchmarks.steps_compared`."""

from dataclasses import dataclass
from pathlib import Path

from cs336_basics.cli import ModelName
from cs336_basics.presets import MODELS
from experiments.benchmarks.harness import write_rows
from experiments.results import RESULTS


@dataclass(frozen=True)
class TrainingStepBenchmark:
    """Compare our training step with Hugging Face's Llama: tokens per second, utilization and peak memory."""

    preset: ModelName = "tinystories-17m"
    """Name of a preset, whose model is used."""
    batch_size: int = 128
    """Sequences per step."""
    steps: int = 20
    """Timed steps per round."""
    rounds: int = 5
    """Time every contender this many times, in turn."""
    peak_tflops: float | None = None
    """Measured rate of a large matmul in TFLOP/s, from which the utilization is calculated. Default: not reported."""
    eager_only: bool = False
    """Skip the compiled models."""
    out: Path = RESULTS
    """Folder of the results."""

    def execute(self) -> None:
        """Measure, and write benchmark_training_step.json."""
        from experiments.benchmarks.steps_compared import compare

        config = MODELS[self.preset]
        rows, device = compare(config, self.batch_size, self.steps, self.rounds, self.peak_tflops, self.eager_only)
        what = f"a training step of {self.preset}, batch {self.batch_size} x {config.context_length}"
        write_rows("benchmark_training_step", what, rows, self.out, device)
