"""Plot the losses of runs, and set the style of the figures in the write-ups."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cs336_basics.run_folder import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ["#1b6ca8", "#d1495b", "#3a7d44", "#e0a030", "#6c4f8c", "#555555", "#2aa198", "#a0522d"]
#: matplotlib's settings for figures of the write-ups.
STYLE: dict[str, Any] = {
    "font.family": "serif",
    "font.serif": ["DejaVu Serif"],
    "font.size": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "legend.fontsize": 7.5,
    "lines.linewidth": 1.3,
    "svg.hashsalt": "cs336",  # the names inside an SVG are random otherwise
    "svg.fonttype": "path",
}


def panels(count: int, height: float = 2.3, rows: int = 1) -> tuple["Figure", list["Axes"]]:
    """Make a figure of the write-ups' width with `count` axes side by side; several rows share their scales.

    Args:
        count: number of columns.
        height: height in inches.
        rows: number of rows.
    """
    import matplotlib.pyplot as plt

    shared = rows > 1
    figure, axes = plt.subplots(
        rows, count, figsize=(6.6, height), layout="constrained", squeeze=False, sharex=shared, sharey=shared
    )
    return figure, [*axes.flat]


def save_figures(draw: Mapping[str, Callable[[], "Figure"]], folder: Path) -> None:
    """Draw each figure in the write-ups' style to `<folder>/<name>.svg`, with the same bytes at every call."""
    import matplotlib
    from cycler import cycler

    matplotlib.use("Agg")  # files only, so no display is needed
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    style: Any = STYLE | {"axes.prop_cycle": cycler(color=COLORS)}
    with plt.rc_context(style):
        for name, draw_one in draw.items():
            figure = draw_one()
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
            plt.close(figure)


def plot_loss(run_dir: Path, destination: Path) -> None:
    """Plot the training and validation loss of a run against its tokens, as PNG."""
    import matplotlib  # only here: importing it takes a second that most commands need not wait for

    matplotlib.use("Agg")  # files only, so no display is needed
    import matplotlib.pyplot as plt
    from matplotlib.ticker import EngFormatter

    records = read_metrics(run_dir / "metrics.jsonl")
    training = [record for record in records if "loss" in record]
    tokens_at = {record["step"]: record["tokens"] for record in training}
    validation = [record for record in records if "valid_loss" in record]

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    tokens = [record["tokens"] for record in training]
    axes.plot(
        tokens, [record["loss"] for record in training], color="#9ecae1", linewidth=0.8, label="training (each batch)"
    )
    axes.plot(
        [tokens_at[record["step"]] for record in validation],
        [record["valid_loss"] for record in validation],
        color="#08519c",
        marker="o",
        markersize=4,
        label=f"validation (last: {validation[-1]['valid_loss']:.3f})" if validation else "validation",
    )
    axes.set(xlabel="tokens trained on", ylabel="loss (nats per token)", title=run_dir.name)
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(destination, dpi=150)
    plt.close(figure)
