"""The log of a run: `metrics.jsonl`, and a live line in the terminal.

The log is an ordinary file that can be read while the run goes on. W&B gets a copy if asked for.
"""

import json
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cs336_basics.run_folder import read_metrics, start_wandb, write_atomically

#: Packages whose versions are recorded with a run or a result; see `run_folder.environment`.
PACKAGES = ("torch", "numpy", "triton")


class RunLog:
    """Write the metrics of a run as they arrive; a context manager.

    Args:
        run_dir: the run folder.
        total_steps: where the progress bar ends.
        start_step: the step that training resumes from. Metrics of later steps, which a killed run may have left
            behind, are dropped, because those steps are run again.
        wandb_project: send the metrics to this W&B project too.
        config: the configuration that W&B shows for the run.
    """

    def __init__(
        self,
        run_dir: Path,
        total_steps: int,
        start_step: int = 0,
        wandb_project: str | None = None,
        config: dict[str, Any] | None = None,
    ) -> None:
        self.path = run_dir / "metrics.jsonl"
        kept = [record for record in read_metrics(self.path) if record["step"] <= start_step]
        write_atomically(self.path, "".join(json.dumps(record) + "\n" for record in kept))
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (closed in __exit__)
        self._wandb = start_wandb(wandb_project, run_dir, config) if wandb_project else None
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
        """Append records, each of which has a "step", and show the latest."""
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
        """Print the state on a line of its own if there is no terminal to update, as in a log file or CI."""
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
