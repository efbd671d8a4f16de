"""Plots of runs."""

from pathlib import Path

from cs336_basics.run_log import read_metrics


def plot_loss(run: Path, destination: Path) -> None:
    """Draw training and validation loss of a run against its tokens, as PNG."""
    import matplotlib  # here, because it takes a second that most commands need not wait for

    matplotlib.use("Agg")  # files only: no display is needed
    import matplotlib.pyplot as plt
    from matplotlib.ticker import EngFormatter

    records = read_metrics(run / "metrics.jsonl")
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
    axes.set(xlabel="tokens trained on", ylabel="loss (nats per token)", title=run.name)
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(destination, dpi=150)
    plt.close(figure)
