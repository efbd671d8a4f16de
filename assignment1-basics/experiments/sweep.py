"""Train many models: side by side, resumable, and with a record of each.

A `Run` whose configuration is in the results already is not repeated, and one that was interrupted resumes from its
checkpoint. A run that diverges or does not fit into memory is a result too. A run with a time limit gets as many steps
as fit into it, and starts again if it was interrupted.
"""

import multiprocessing
import shutil
import statistics
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cs336_basics.run_folder import config_to_json, differences, environment, read_metrics
from cs336_basics.train_config import TrainConfig
from experiments.leaderboard.config import LeaderboardConfig
from experiments.results import read_result, result_path, write_result

if TYPE_CHECKING:
    from cs336_basics.model import CausalAttention

#: The most points of a curve that are kept; each is the mean of the steps it stands for.
POINTS = 100
#: Fields that the result of a run does not depend on, or that differ between machines.
_NOT_COMPARED = ("run_dir", "train_data", "valid_data", "tokenizer", "device", "keep_checkpoints", "checkpoint_every")
#: Names of fields in older results -> their names today.
_RENAMED = {"eval_windows": "eval_sequences"}
#: Steps of the two runs before a run with a time limit: the first compiles, the second is timed.
PROBE_STEPS = 40
#: Share of the time limit that is planned for, because steps may be slower than in the probe.
PLANNED = 0.96

Attention = Literal["plain", "flash"]


@dataclass(frozen=True)
class Run:
    """One model of a problem's experiment."""

    problem: str
    name: str
    config: TrainConfig
    attention: Attention = "plain"
    """plain: the model's own. flash: Assignment 2's kernel."""
    seconds: float | None = None
    """Time limit. The run gets as many steps as fit into it, including evaluations but not compilation; the warm-up,
    decay and evaluations of `config` are scaled with its steps."""


def run_all(runs: Iterable[Run], folder: Path, results: Path, workers: int, minutes: float) -> None:
    """Train the models that have not been trained yet.

    Args:
        runs: the models.
        folder: where to create the run folders.
        results: folder of the results; a problem's file is rewritten whenever one of its runs has ended.
        workers: models to train at a time.
        minutes: start no further model after this many minutes.
    """
    from rich.progress import Progress, TimeElapsedColumn

    runs = [replace(run, config=replace(run.config, run_dir=folder / run.problem / run.name)) for run in runs]
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
            with_it = _with(rows[run.problem], row)
            rows[run.problem] = sorted(with_it, key=lambda row: order.get((run.problem, row["name"]), -1))
            _write(run.problem, rows[run.problem], results)
            progress.console.print(_line(run, row), highlight=False)
            progress.advance(task)
    left = [run for run in runs if not _is_done(run, rows[run.problem])]
    if left:
        print(f"not started within {minutes:g} minutes: {', '.join(f'{run.problem}/{run.name}' for run in left)}")


def run_here(run: Run, folder: Path, results: Path) -> dict[str, Any]:
    """Train one model in this process, unless it is in the results, and return its row."""
    run = replace(run, config=replace(run.config, run_dir=folder / run.problem / run.name))
    rows = _rows(run.problem, results)
    if done := next((row for row in rows if _is_the_row(run, row)), None):
        return done
    row = _train(run, 1, float("inf"))
    assert row is not None
    _write(run.problem, _with(rows, row), results)
    print(_line(run, row))
    return row


def stretched(config: TrainConfig, steps: int) -> TrainConfig:
    """Change the number of steps, and scale everything that is counted in steps."""

    def scaled(number: int) -> int:
        return max(1, round(number * steps / config.steps))

    old = config.optimizer
    decay = None if old.decay_steps is None else scaled(old.decay_steps)
    optimizer = replace(old, warmup_steps=scaled(old.warmup_steps), decay_steps=decay)
    every = scaled(config.eval_every)
    return replace(config, steps=steps, optimizer=optimizer, eval_every=every, checkpoint_every=steps)


def summary(config: TrainConfig) -> dict[str, Any]:
    """Return the part of a configuration that is kept with a result, and that a repetition has to have in common."""
    return {key: value for key, value in config_to_json(config).items() if key not in _NOT_COMPARED}


def _rows(problem: str, results: Path) -> list[dict[str, Any]]:
    return read_result(problem, results)["rows"] if result_path(problem, results).exists() else []


def _with(rows: list[dict[str, Any]], row: dict[str, Any]) -> list[dict[str, Any]]:
    """Append a row, and remove an older one with the same name."""
    return [*(other for other in rows if other["name"] != row["name"]), row]


def _write(problem: str, rows: list[dict[str, Any]], results: Path) -> None:
    """Write the rows. The file names the devices they were measured on, not the one it was written on."""
    devices = ", ".join(dict.fromkeys(row["device"] for row in rows))
    write_result(problem, f"models trained for {problem}", {"device": devices, "rows": rows}, results)


def _is_done(run: Run, rows: list[dict[str, Any]]) -> bool:
    return any(_is_the_row(run, row) for row in rows)


def _is_the_row(run: Run, row: dict[str, Any]) -> bool:
    asked = run.config if run.seconds is None else stretched(run.config, row["config"]["steps"])
    same = (row.get("attention", "plain"), row.get("seconds")) == (run.attention, run.seconds)
    stored = {_RENAMED.get(key, key): value for key, value in row["config"].items()}
    defaults = config_to_json(type(asked)())
    return row["name"] == run.name and same and not differences(stored, summary(asked), defaults=defaults)


def train(config: TrainConfig, causal_attention: "CausalAttention | None" = None) -> None:
    """Train one model, with the leaderboard's options if the configuration has them."""
    from cs336_basics import training
    from experiments.leaderboard import model

    if isinstance(config, LeaderboardConfig):
        model.train(config, causal_attention)
    else:
        training.train(config, causal_attention=causal_attention)


def _train(run: Run, workers: int, deadline: float) -> dict[str, Any] | None:
    """Train one model, in a process of the pool, and return its row; None if it is too late to start."""
    if time.time() > deadline:
        return None
    import torch

    from cs336_basics.run_log import PACKAGES
    from cs336_basics.strategy import resolve_device

    device = resolve_device(run.config.device)
    torch.compiler.reset()  # the next model has other shapes, so a compiled one is not kept
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    if run.seconds is not None:
        shutil.rmtree(run.config.run_dir, ignore_errors=True)
    run.config.run_dir.mkdir(parents=True, exist_ok=True)
    status, config, compile_s, began = "finished", run.config, None, time.perf_counter()
    with ExitStack() as stack:
        log = stack.enter_context((run.config.run_dir / "log.txt").open("a", encoding="utf-8"))
        stack.enter_context(redirect_stdout(log))
        stack.enter_context(redirect_stderr(log))
        try:
            attention = _attention(run.attention)
            if run.seconds is not None:
                config = _as_many_steps_as_fit(run, run.seconds, attention)
                compile_s, began = time.perf_counter() - began, time.perf_counter()
            train(config, causal_attention=attention)
        except FloatingPointError as error:
            status = f"diverged: {error}".split(";")[0]
        except torch.OutOfMemoryError:
            status = "out of memory"
    wall_s = time.perf_counter() - began
    if run.seconds is not None:
        shutil.rmtree(config.run_dir / "checkpoints", ignore_errors=True)
        if status == "finished" and wall_s > run.seconds:
            status = "out of time"
    return {
        "name": run.name,
        "status": status,
        "config": summary(config),
        "attention": run.attention,
        **({} if run.seconds is None else {"seconds": run.seconds, "compile_and_probe_s": compile_s}),
        **environment(device, PACKAGES),
        "models_at_once": workers,
        "wall_s": round(wall_s, 1),
        "peak_GB": round(torch.cuda.max_memory_allocated(device) / 1e9, 2) if device.type == "cuda" else None,
        **measured(read_metrics(run.config.run_dir / "metrics.jsonl")),
    }


def _as_many_steps_as_fit(run: Run, seconds: float, attention: "CausalAttention | None") -> TrainConfig:
    """Compile the model, time some of its steps, and give the run as many as fit into `seconds`."""
    probe = replace(stretched(run.config, PROBE_STEPS), run_dir=run.config.run_dir / "probe", eval_every=PROBE_STEPS)
    for _ in range(2):
        shutil.rmtree(probe.run_dir, ignore_errors=True)
        began = time.perf_counter()
        train(probe, causal_attention=attention)
        wall_s = time.perf_counter() - began
    step_s = read_metrics(probe.run_dir / "metrics.jsonl")[-2]["seconds"] / PROBE_STEPS
    shutil.rmtree(probe.run_dir)
    around_s = wall_s - PROBE_STEPS * step_s  # the model's start, an evaluation, a checkpoint
    evaluations = run.config.steps // run.config.eval_every
    steps = int((PLANNED * seconds - evaluations * around_s) / step_s)
    if steps < PROBE_STEPS:
        raise ValueError(
            f"{seconds:g} s are too short for {run.name}, whose step takes {step_s:.3f} s; allow more time"
        )
    return stretched(run.config, steps)


def _attention(name: Attention) -> "CausalAttention | None":
    if name == "plain":
        return None
    try:
        from cs336_systems.kernels.flash_attention import flash_attention
    except ModuleNotFoundError as error:
        if error.name != "cs336_systems":
            raise
        raise ValueError(
            "FlashAttention is Assignment 2's, which is not installed; add assignment2-systems to PYTHONPATH"
        ) from None
    return flash_attention


def measured(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Summarize the metrics of a run: its last and best losses, its speed, and its curves with `POINTS` points."""
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
    """Return the median; None if no record has the key, as the utilization of a device with an unknown peak rate."""
    values = [record[key] for record in records if key in record]
    return statistics.median(values) if values else None


def _line(run: Run, row: dict[str, Any]) -> str:
    numbers = {"valid": row["valid_loss"], "best": row["best_valid_loss"], "train": row["train_loss"]}
    shown = "  ".join(f"{name} {value:.4f}" for name, value in numbers.items() if value is not None)
    speed = f"{row['tokens_per_second']:,.0f} tok/s" if row["tokens_per_second"] else ""
    return f"{run.problem}/{run.name}: {shown}  {speed}  {row['wall_s']} s  {row['status']}"
