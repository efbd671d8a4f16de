"""How fast `train` is, and what the GPU does meanwhile: the preset tinystories-17m, alone on the machine."""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from cs336_basics.presets import TRAIN
from cs336_basics.run_folder import read_metrics
from experiments.results import RESULTS, write_result
from experiments.sweep import measured


@dataclass(frozen=True)
class Throughput:
    """Train for some hundred steps, then profile a few of them, and write throughput.json."""

    tinystories: Path = Path("data/tinystories")
    """Folder of train.npy and valid.npy."""
    steps: int = 600
    """Steps of the run that is timed, evaluations included."""
    profiled: int = 20
    """Steps that are profiled, in a run of their own."""
    device: str = "auto"
    """cpu, cuda, or auto for a GPU if there is one."""
    out: Path = RESULTS
    """Folder of the results."""

    def execute(self) -> None:
        """Measure."""
        from cs336_basics.training import train
        from experiments.kernel_times import ProfiledDevice, kernel_times

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
