"""The demonstration with several seeds: accuracy on held-out problems after imitation and after GRPO, and seconds.

    python -m experiments.demo_rl [--seeds 0 1 2] [--out results/demo_rl]

Writes demo_rl.json, and demo_rl.png of the first seed.
"""

import resource
import shutil
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch
import tyro

from cs336_alignment.programs.configs.demo import DemoConfig
from cs336_alignment.programs.demo import run_demo
from experiments.results import RESULTS, write_result


def cpu_seconds() -> float:
    """Return the CPU time of this process and of its children that have ended."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in usage)


def main(seeds: tuple[int, ...] = (0, 1, 2), out: Path = RESULTS / "demo_rl") -> None:
    """Run the demonstration with several seeds.

    Args:
        seeds: Seeds to run it with.
        out: Folder to write the result to.
    """
    rows = []
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            config = DemoConfig(run_dir=Path(folder) / "demo", seed=seed)
            started, cpu_before = time.perf_counter(), cpu_seconds()
            result = run_demo(config)
            seconds = {"seconds": time.perf_counter() - started, "cpu_seconds": cpu_seconds() - cpu_before}
            rows.append({"seed": seed, "held_out_problems": config.held_out, **asdict(result), **seconds})
            if seed == seeds[0]:
                out.mkdir(parents=True, exist_ok=True)
                shutil.copy(config.run_dir / "rewards.png", out / "demo_rl.png")
    what = f"the demonstration: accuracy at temperature 1, {torch.get_num_threads()} threads"
    write_result(out / "demo_rl.json", what, torch.device("cpu"), rows)


if __name__ == "__main__":
    tyro.cli(main)
