"""Plots of runs."""

from pathlib import Path

from cs336_alignment.run_log import read_metrics

PALE, DARK = "#9ecae1", "#08519c"


def plot_rewards(run: Path, destination: Path) -> None:
    """Draw reward, held-out accuracy and the length of responses against the updates of a run of GRPO, as PNG."""
    import matplotlib  # here, because it takes a second that most commands need not wait for

    matplotlib.use("Agg")  # files only: no display is needed
    import matplotlib.pyplot as plt
    from matplotlib.ticker import PercentFormatter

    records = read_metrics(run / "metrics.jsonl")
    figure, (above, below) = plt.subplots(2, sharex=True, figsize=(7, 5), layout="constrained", height_ratios=(3, 2))
    for axes, metric, pale, dark in (
        (above, "reward", "reward of a batch of rollouts", "accuracy on held-out problems"),
        (below, "response_length", "rollouts", "held-out problems"),
    ):
        for kind, label, style in (
            ("train", pale, {"color": PALE, "linewidth": 1.0}),
            ("eval", dark, {"color": DARK, "marker": "o", "markersize": 4}),
        ):
            points = [
                (each[f"{kind}_step"], each[f"{kind}/{metric}"]) for each in records if f"{kind}/{metric}" in each
            ]
            if points:
                axes.plot(*zip(*points), label=label, **style)
        axes.grid(alpha=0.3)
        axes.legend()
    above.yaxis.set_major_formatter(PercentFormatter(1.0))
    above.set(title=run.name, ylim=(0, 1))
    below.set(xlabel="updates of the policy", ylabel="tokens of a response")
    figure.savefig(destination, dpi=150)
    plt.close(figure)
