"""The demonstration with several seeds: accuracy on held-out problems after imitation and after GRPO, and seconds.

    python -m benchmarks.demo_rl [--seeds 0 1 2] [--out results]

Writes demo_rl.json, and demo_rl.png of the first seed.
"""

import argparse
import json
import resource
import shutil
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch

from cs336_alignment.programs.configs.demo import DemoConfig
from cs336_alignment.programs.demo import run_demo
from cs336_alignment.run_folder import write_atomically
from cs336_alignment.runs.run_log import describe_environment

RESULTS = Path(__file__).parent.parent / "results"


def cpu_seconds() -> float:
    """Of this process and of those that it has waited for."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in usage)


def main() -> None:
    parser = argparse.ArgumentParser(description="Run the demonstration with several seeds.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()
    rows = []
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as folder:
            config = DemoConfig(run_dir=Path(folder) / "demo", seed=seed)
            started, cpu_before = time.perf_counter(), cpu_seconds()
            result = run_demo(config)
            seconds = {"seconds": time.perf_counter() - started, "cpu_seconds": cpu_seconds() - cpu_before}
            rows.append({"seed": seed, "held_out_problems": config.held_out, **asdict(result), **seconds})
            if seed == options.seeds[0]:
                options.out.mkdir(parents=True, exist_ok=True)
                shutil.copy(config.run_dir / "rewards.png", options.out / "demo_rl.png")
    what = f"the demonstration: accuracy at temperature 1, {torch.get_num_threads()} threads"
    record = {"what": what, **describe_environment(torch.device("cpu")), "rows": rows}
    write_atomically(options.out / "demo_rl.json", json.dumps(record, indent=1) + "\n")
    for row in rows:
        print("  ".join(f"{key} {value:.4g}" for key, value in row.items()))


if __name__ == "__main__":
    main()
