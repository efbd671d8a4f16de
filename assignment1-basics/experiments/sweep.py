"""Training many models: side by side, resumable, and with a record of each.

A `Run` that is in `results/<problem>.json` with its configuration has been done and is not done again; one that was
interrupted goes on from its checkpoint. A run that diverges or does not fit into memory is a result too.
"""

import multiprocessing
import statistics
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress, TimeElapsedColumn

from cs336_basics.run_log import environment, read_metrics
from cs336_basics.strategy import resolve_device
from cs336_basics.training import TrainConfig, config_to_json, differences, train
from experiments.results import read_result, write_result

#: Points of a curve that are kept, each the mean of the steps it stands for.
POINTS = 100
#: What a run's result does not depend on, or what is not the same on another machine.
_NOT_COMPARED = ("run", "train_data", "valid_data", "tokenizer", "device", "keep_checkpoints", "checkpoint_every")


@dataclass(frozen=True)
class Run:
    """One model of a problem's experiment."""

    problem: str
    name: str
    config: TrainConfig


def run_all(runs: Iterable[Run], folder: Path, results: Path, workers: int, minutes: float) -> None:
    """Train what has not been trained yet, `workers` models at a time; begin none after `minutes`.

    Args:
        folder: for the folders of the runs.
        results: where `<problem>.json` is kept, rewritten whenever a run has ended.
    """
    runs = [replace(run, config=replace(run.config, run=folder / run.problem / run.name)) for run in runs]
    rows = {problem: _rows(problem, results) for problem in dict.fromkeys(run.problem for run in runs)}
    missing = [run for run in runs if not _is_done(run, rows[run.problem])]
    print(f"{len(runs)} runs, of which {len(runs) - len(missing)} are in {results}")
    deadline = time.time() + 60 * minutes
    order = {(run.problem, run.name): number for number, run in enumerate(runs)}
    columns = (*Progress.get_default_columns(), TimeElapsedColumn())
    with (
        ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool,
        Progress(*columns) as progress,
    ):
        task = progress.add_task("models", total=len(missing))
        futures = {pool.submit(_train, run, workers, deadline): run for run in missing}
        for future in as_completed(futures):
            run, row = futures[future], future.result()
            if row is None:
                continue
            kept = [other for other in rows[run.problem] if other["name"] != run.name]
            rows[run.problem] = sorted([*kept, row], key=lambda row: order.get((run.problem, row["name"]), -1))
            write_result(run.problem, f"models trained for {run.problem}", {"rows": rows[run.problem]}, results)
            progress.console.print(_line(run, row), highlight=False)
            progress.advance(task)
    left = [run for run in runs if not _is_done(run, rows[run.problem])]
    if left:
        print(f"not begun within {minutes:g} minutes: {', '.join(f'{run.problem}/{run.name}' for run in left)}")


def summary(config: TrainConfig) -> dict[str, Any]:
    """The configuration as it is kept with a result: what a repetition has to have in common."""
    return {key: value for key, value in config_to_json(config).items() if key not in _NOT_COMPARED}


def _rows(problem: str, results: Path) -> list[dict[str, Any]]:
    return read_result(problem, results)["rows"] if (results / f"{problem}.json").exists() else []


def _is_done(run: Run, rows: list[dict[str, Any]]) -> bool:
    return any(row["name"] == run.name and not differences(row["config"], summary(run.config)) for row in rows)


def _train(run: Run, workers: int, deadline: float) -> dict[str, Any] | None:
    """Train one model, in a process of the pool; None if it is too late to begin."""
    if time.time() > deadline:
        return None
    device = resolve_device(run.config.device)
    torch.compiler.reset()  # a compiled model is not kept for the next one, whose shapes differ
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    run.config.run.mkdir(parents=True, exist_ok=True)
    status, began = "finished", time.perf_counter()
    with ExitStack() as stack:
        log = stack.enter_context((run.config.run / "log.txt").open("a", encoding="utf-8"))
        stack.enter_context(redirect_stdout(log))
        stack.enter_context(redirect_stderr(log))
        try:
            train(run.config)
        except FloatingPointError as error:
            status = f"diverged: {error}".split(";")[0]
        except torch.OutOfMemoryError:
            status = "out of memory"
    return {
        "name": run.name,
        "status": status,
        "config": summary(run.config),
        **environment(device),
        "models_at_once": workers,
        "wall_s": round(time.perf_counter() - began, 1),
        "peak_GB": round(torch.cuda.max_memory_allocated(device) / 1e9, 2) if device.type == "cuda" else None,
        **measured(read_metrics(run.config.run / "metrics.jsonl")),
    }


def measured(records: list[dict[str, Any]]) -> dict[str, Any]:
    """What is kept of a run's metrics: its end, its best, its speed, and its curves at a stride."""
    training = [record for record in records if "loss" in record]
    validation = [record for record in records if "valid_loss" in record]
    stride = -(-len(training) // POINTS) or 1
    groups = [training[first : first + stride] for first in range(0, len(training), stride)]
    steady = training[len(training) // 10 :]  # after compilation
    losses = [record["valid_loss"] for record in validation]
    return {
        "steps_done": training[-1]["step"] if training else 0,
        "valid_loss": losses[-1] if losses else None,
        "best_valid_loss": min(losses, default=None),
        "train_loss": statistics.fmean(record["loss"] for record in training[-50:]) if training else None,
        "tokens_per_second": _median(steady, "tokens_per_second"),
        "mfu": _median(steady, "mfu"),
        "train_s": training[-1]["seconds"] if training else None,
        "curve": {
            "step": [group[-1]["step"] for group in groups],
            "tokens": [group[-1]["tokens"] for group in groups],
            "seconds": [group[-1]["seconds"] for group in groups],
            "loss": [_mean(group, "loss") for group in groups],
            "grad_norm": [_mean(group, "grad_norm") for group in groups],
        },
        "valid_curve": {
            "step": [record["step"] for record in validation],
            "valid_loss": [round(loss, 5) for loss in losses],
        },
    }


def _mean(group: list[dict[str, Any]], key: str) -> float:
    return round(statistics.fmean(record[key] for record in group), 5)


def _median(records: list[dict[str, Any]], key: str) -> float | None:
    """None if no record has the key: the utilisation of a device whose peak is not known."""
    values = [record[key] for record in records if key in record]
    return statistics.median(values) if values else None


def _line(run: Run, row: dict[str, Any]) -> str:
    numbers = {"valid": row["valid_loss"], "best": row["best_valid_loss"], "train": row["train_loss"]}
    shown = "  ".join(f"{name} {value:.4f}" for name, value in numbers.items() if value is not None)
    speed = f"{row['tokens_per_second']:,.0f} tok/s" if row["tokens_per_second"] else ""
    return f"{run.problem}/{run.name}: {shown}  {speed}  {row['wall_s']} s  {row['status']}"
