"""Training on cores that other programs use too.

The demo's training step runs in a new process under each setting of OpenMP's threads, on an idle machine and next to
busy processes, with all settings in turn. Between two parallel regions OpenMP's threads spin for a while before they
sleep (libgomp: 300 000 iterations of a loop unless GOMP_SPINCOUNT says otherwise). On an idle machine that saves the
time to wake them. On a busy one they spin for a partner that is not running, and use up the share of the cores that it
waits for.

The fair share of a busy machine is n / (n + busy) of the idle machine's speed, where n is the number of its cores.
"""

import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from cs336_basics.machine import available_cpus
from experiments.benchmarks.harness import write_rows
from experiments.results import RESULTS

SETTINGS: dict[str, dict[str, str]] = {
    "PyTorch's default": {},
    "GOMP_SPINCOUNT=0": {"GOMP_SPINCOUNT": "0"},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "GOMP_SPINCOUNT=2000": {"GOMP_SPINCOUNT": "2000"},
    "GOMP_SPINCOUNT=4000": {"GOMP_SPINCOUNT": "4000"},
    "GOMP_SPINCOUNT=30000": {"GOMP_SPINCOUNT": "30000"},
    "OMP_NUM_THREADS=1": {"OMP_NUM_THREADS": "1"},
}


def train(seconds: float) -> None:
    """Print a line when ready, wait for a line, then print the tokens per second of the demo's training step."""
    import torch

    from cs336_basics.demo import DemoConfig
    from cs336_basics.model import BasicsTransformerLM
    from cs336_basics.nn_utils import clip_gradient, cross_entropy
    from cs336_basics.optimizer import AdamW

    config = DemoConfig()
    torch.manual_seed(0)
    model = BasicsTransformerLM.from_config(config.model)
    optimizer = AdamW(model.parameters())
    ids = torch.randint(config.model.vocab_size, (config.batch_size, config.model.context_length + 1))

    def step() -> None:
        cross_entropy(model(ids[:, :-1]), ids[:, 1:]).backward()
        clip_gradient(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(3):
        step()
    print("ready", flush=True)
    input()
    steps, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds:
        step()
        steps += 1
    print(steps * ids[:, 1:].numel() / elapsed)


def keep_busy() -> None:
    """Use a core until the process is killed."""
    while True:
        pass


def tokens_per_second(setting: dict[str, str], busy: int, seconds: float) -> float:
    """Return the speed of training under a setting next to `busy` busy processes."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_"))}
    command = [sys.executable, "-c", f"from {__name__} import train; train({seconds})"]
    with ExitStack() as stack:
        training = stack.enter_context(
            subprocess.Popen(command, env=inherited | setting, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        )
        assert training.stdout is not None
        training.stdout.readline()
        for _ in range(busy):
            process = multiprocessing.Process(target=keep_busy, daemon=True)
            process.start()
            stack.callback(process.kill)
        return float(training.communicate("start\n")[0])


@dataclass(frozen=True)
class SharedMachine:
    """Measure the demo's training step under settings of OpenMP, on an idle and on a busy machine."""

    rounds: int = 3
    """Measure every setting this many times, in turn."""
    seconds: float = 5.0
    """Seconds of training for each measurement."""
    out: Path = RESULTS
    """Folder of the results."""

    def execute(self) -> None:
        """Measure all settings, and write shared_machine.json."""
        cores, rows = available_cpus(), []
        for busy in (0, cores, 2 * cores):
            measured: dict[str, list[float]] = {name: [] for name in SETTINGS}
            for _ in range(self.rounds):
                for name, setting in SETTINGS.items():
                    measured[name].append(tokens_per_second(setting, busy, self.seconds))
            rows += [
                {
                    "busy_processes": busy,
                    "fair_share": cores / (cores + busy),
                    "setting": name,
                    "tokens_per_second": statistics.median(speeds),
                    "min": min(speeds),
                    "max": max(speeds),
                }
                for name, speeds in measured.items()
            ]
        write_rows("shared_machine", f"the demo's training step on {cores} shared cores", rows, self.out)
