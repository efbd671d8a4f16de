"""The record of a run: `config.json`, `metrics.jsonl`, and a live line in the terminal.

Everything is an ordinary file that can be read while the run goes on. W&B gets a copy if asked for.
"""

import json
import os
import platform
import subprocess
import sys
import uuid
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cs336_basics.machine import available_cpus


class RunLog:
    """Writes the metrics of a run as they come.

    Args:
        folder: the run's folder.
        total_steps: where the progress bar ends.
        start_step: the step that training resumes from. Metrics of later steps, which a killed run may have
            left behind, are dropped: they come again.
        wandb_project: send the metrics to this W&B project too.
        config: what W&B shows as the run's configuration.
    """

    def __init__(
        self,
        folder: Path,
        total_steps: int,
        start_step: int = 0,
        wandb_project: str | None = None,
        config: dict[str, Any] | None = None,
    ) -> None:
        self.path = folder / "metrics.jsonl"
        kept = [record for record in read_metrics(self.path) if record["step"] <= start_step]
        write_atomically(self.path, "".join(json.dumps(record) + "\n" for record in kept))
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (closed in __exit__)
        self._wandb = _start_wandb(wandb_project, folder, config) if wandb_project else None
        self.latest: dict[str, float] = {}
        for record in kept:
            self.latest |= record

        self.console = Console(stderr=True)
        self._progress = Progress(
            MofNCompleteColumn(),
            BarColumn(bar_width=8),
            TextColumn("{task.fields[metrics]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=self.console,
            refresh_per_second=4,
            disable=not self.console.is_terminal,
        )
        self._task = self._progress.add_task("train", total=total_steps, completed=start_step, metrics=self._line())

    def __enter__(self) -> "RunLog":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        self._file.close()
        if self._wandb:
            self._wandb.finish(exit_code=0 if error is None else 1)

    def write(self, records: list[dict[str, float]]) -> None:
        """Append records, each with its "step", and show the latest."""
        try:
            self._file.writelines(json.dumps(record) + "\n" for record in records)
            self._file.flush()
        except OSError as error:
            raise OSError(
                f"cannot write {self.path} ({error.strerror}); free some space, then run the same command again"
            ) from error
        for record in records:
            self.latest |= record
            if self._wandb:
                self._wandb.log(
                    {key: value for key, value in record.items() if key != "step"}, step=int(record["step"])
                )
        self._progress.update(self._task, completed=self.latest.get("step", 0), metrics=self._line())

    def show_line(self) -> None:
        """Where there is no terminal to update (a log file, CI), print the state as a line of its own."""
        if not self.console.is_terminal:
            self.console.print(f"step {self.latest['step']:.0f}  {self._line()}", highlight=False, soft_wrap=True)

    def _line(self) -> str:
        shown = {
            "loss": "loss {:.3f}",
            "valid_loss": "valid {:.3f}",
            "lr": "lr {:.1e}",
            "tokens_per_second": "{:,.0f} tok/s",
            "mfu": "MFU {:.0%}",
        }
        return "  ".join(form.format(self.latest[key]) for key, form in shown.items() if key in self.latest)


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
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": _git_commit(),
        "command": " ".join([Path(sys.argv[0].removesuffix("/__main__.py")).name, *sys.argv[1:]]),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "numpy", "triton")},
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

    kept = folder / "wandb_id.txt"  # so that a resumed run goes on in the same curve
    if not kept.exists():
        write_atomically(kept, uuid.uuid4().hex[:12])
    return wandb.init(project=project, name=folder.name, id=kept.read_text(), dir=folder, config=config, resume="allow")
