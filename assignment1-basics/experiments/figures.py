"""Draw the figures of the write-up from `results/`, as SVG files that are the same at every call."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cs336_basics.plots import panels, save_figures
from experiments.results import RESULTS, read_result

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Figures:
    """Draw the figures of the write-up."""

    out: Path = Path("writeup/figures")
    """Folder to write the SVG files to."""
    results: Path = RESULTS
    """Folder of the results."""

    def execute(self) -> None:
        """Draw all of them."""
        save_figures({name: partial(draw, self.results) for name, draw in FIGURES.items()}, self.out)


def _rows(problem: str, results: Path) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in read_result(problem, results)["rows"]}


def _curves(axes: "Axes", rows: dict[str, dict[str, Any]], kind: str) -> None:
    from matplotlib.ticker import EngFormatter

    for label, row in rows.items():
        if kind == "valid_loss":
            per_step = row["config"]["batch_size"] * row["config"]["model"]["context_length"]
            x, y = [step * per_step for step in row["valid_curve"]["step"]], row["valid_curve"]["valid_loss"]
        else:
            x, y = row["curve"]["tokens"], row["curve"]["loss"]
        axes.plot(x, y, label=label)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlabel("tokens")


def token_budget(results: Path) -> "Figure":
    """Draw validation and training loss for four lengths of training."""
    figure, (valid, train) = panels(2)
    rows = _rows("token_budget", results)
    _curves(valid, rows, "valid_loss")
    _curves(train, rows, "loss")
    valid.set(ylabel="validation loss", ylim=(2.1, 4.6))
    train.set(ylabel="training loss", ylim=(0, 4.6))
    valid.legend(title="a whole schedule of")
    return figure


def learning_rate(results: Path) -> "Figure":
    """Draw the curves of the sweep, and the losses at their ends against the learning rate."""
    figure, (curves, ends) = panels(2)
    rows = _rows("learning_rate", results)
    finished = {name: row for name, row in rows.items() if row["status"] == "finished"}
    diverged = {name: row for name, row in rows.items() if row["status"] != "finished"}
    _curves(curves, finished, "loss")
    for row in diverged.values():
        curves.plot(row["curve"]["tokens"], row["curve"]["loss"], color="#999999", linewidth=0.9)
    curves.set(ylabel="training loss", ylim=(1, 9.5))
    curves.legend(ncols=2)
    lrs = [row["config"]["optimizer"]["lr"] for row in finished.values()]
    ends.semilogx(lrs, [row["valid_loss"] for row in finished.values()], marker="o", label="validation")
    ends.semilogx(lrs, [row["train_loss"] for row in finished.values()], marker="s", label="training")
    edge = min(row["config"]["optimizer"]["lr"] for row in diverged.values())
    ends.axvspan(edge, 1, color="#d1495b", alpha=0.12, linewidth=0)
    ends.text(math.sqrt(edge), 3.0, "diverges", color="#d1495b", ha="center")
    ends.set(xlabel="highest learning rate", ylabel="loss at the end", xlim=(7e-5, 1))
    ends.legend(loc="lower right")
    return figure


def ablations(results: Path) -> "Figure":
    """Draw the validation against the training loss of every run, which tells fitting from generalizing."""
    figure, (points, curves) = panels(2)
    rows = _rows("ablations", results)
    for kind in ("baseline", "post-norm", "NoPE", "SiLU"):
        ends = [row for name, row in rows.items() if name.startswith(f"{kind}, seed") and row["valid_loss"] < 4]
        points.scatter([row["train_loss"] for row in ends], [row["valid_loss"] for row in ends], s=16, label=kind)
    points.set(xlabel="training loss", ylabel="validation loss")
    points.legend()
    shown = {
        "baseline": "baseline, seed 0",
        "post-norm, seed 1": "post-norm, seed 1",
        "post-norm, seed 0": "post-norm, seed 0",
        "no norm": "no norm, seed 0",
        "no norm, rate 0.001": "no norm, lr 0.001",
    }
    _curves(curves, {label: rows[name] for label, name in shown.items()}, "loss")
    curves.set(ylabel="training loss", ylim=(1, 11.5))
    curves.legend(loc="upper right")
    return figure


def batch_size(results: Path) -> "Figure":
    """Draw the loss against tokens and against time."""
    figure, (by_tokens, by_time) = panels(2)
    rows = {name: row for name, row in _rows("batch_size_experiment", results).items() if row["steps_done"]}
    _curves(by_tokens, rows, "loss")
    for name, row in rows.items():
        by_time.plot(row["curve"]["seconds"], row["curve"]["loss"], label=name)
    by_tokens.set(ylabel="training loss", ylim=(1, 7))
    by_time.set(xlabel="seconds of training", ylim=(1, 7))
    by_tokens.legend(ncols=2)
    return figure


def main_experiment(results: Path) -> "Figure":
    """Draw the losses of the same model on two corpora."""
    figure, (axes,) = panels(1)
    small, broad = _rows("token_budget", results)["1250 steps"], _rows("main_experiment", results)["lr 0.004"]
    _curves(axes, {"TinyStories, training": small, "Wikipedia, training": broad}, "loss")
    _curves(axes, {"TinyStories, validation": small, "Wikipedia, validation": broad}, "valid_loss")
    axes.set(ylabel="loss (nats per token)", ylim=(0, 9))
    axes.legend(ncols=2)
    return figure


def toy_sgd(results: Path) -> "Figure":
    """Draw the loss against the step for each learning rate."""
    figure, (axes,) = panels(1, 1.9)
    for row in read_result("learning_rate_tuning", results)["rows"]:
        axes.semilogy(row["losses"], marker="o", markersize=3, label=f"{row['lr']:g}")
    axes.set(xlabel="step", ylabel="loss")
    axes.legend(title="learning rate", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


FIGURES: dict[str, Callable[[Path], "Figure"]] = {
    draw.__name__: draw for draw in (token_budget, learning_rate, ablations, batch_size, main_experiment, toy_sgd)
}
