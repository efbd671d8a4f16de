"""experiment_log: how fast `train` is with the preset tinystories-17m, and what the GPU does meanwhile."""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from cs336_basics.presets import TRAIN
from cs336_basics.run_folder import read_metrics
from experiments.results import RESULTS, write_result
from experiments.sweep import measured


@dataclass(frozen=True)
class Throughput:
    """Measure the speed of training, then profile a few steps. Run it alone on the machine."""

    tinystories: Path = Path("data/tinystories")
    """Folder of train.npy and valid.npy."""
    steps: int = 600
    """Steps of the timed run, which includes evaluations."""
    profiled: int = 20
    """Steps to profile, in a run of their own."""
    device: str = "auto"
    """cpu, cuda, or auto for a GPU if there is one."""
    out: Path = RESULTS
    """Folder of the results."""

    def execute(self) -> None:
        """Measure, and write throughput.json."""
        from cs336_basics.training import train
        from experiments.benchmarks.kernel_times import ProfiledDevice, kernel_times

        with tempfile.TemporaryDirectory() as folder:
            config = replace(
                TRAIN["tinystories-17m"][1],
                run_dir=Path(folder) / "timed",
                train_data=self.tinystories / "train.npy",
                valid_data=self.tinystories / "valid.npy",
                steps=self.steps,
                device=self.device,
            )
            train(config)
            speed = measured(read_metrics(config.run_dir / "metrics.jsonl"))
            strategy = ProfiledDevice(self.device, self.profiled)
            with strategy.profiler:
                train(replace(config, run_dir=Path(folder) / "profiled", steps=30 + self.profiled), strategy)
        content = {
            "steps": self.steps,
            "tokens_per_second": speed["tokens_per_second"],
            "mfu": speed["mfu"],
            **kernel_times(strategy.profiler, self.profiled),
        }
        write_result("throughput", "the training command on tinystories-17m", content, self.out, str(strategy.device))
