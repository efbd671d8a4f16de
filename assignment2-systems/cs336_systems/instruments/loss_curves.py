"""Compare the training curve of our FlashAttention with others on Assignment 1's TinyStories model.

It trains with plain attention, with ours, and with PyTorch's FlashAttention-2, from the same weights over the same
batches, in bfloat16 and compiled. Plain attention and PyTorch's differ by rounding alone, which is the yardstick.
"""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from cs336_basics.presets import TRAIN
from cs336_basics.run_folder import read_metrics
from cs336_basics.strategy import resolve_device
from cs336_basics.training import train
from cs336_systems.instruments.measure import print_table, write_result
from cs336_systems.instruments.options.common import Measurement
from cs336_systems.training.choices import ATTENTIONS, AttentionName, resolve

COMPARED: tuple[AttentionName, ...] = ("plain", "flash", "sdpa-flash")


def curve(
    attention: AttentionName, train_data: Path, valid_data: Path, steps: int, batch_size: int, small: bool
) -> dict:
    """Train; return all losses, the last validation loss, and the median tokens per second of the second half."""
    config = TRAIN["tinystories-17m"][1]
    if small:
        config = replace(config, model=replace(config.model, d_model=64, num_layers=2, num_heads=4), compile=False)
    with tempfile.TemporaryDirectory() as folder:
        config = replace(
            config, run_dir=Path(folder), train_data=train_data, valid_data=valid_data, steps=steps,
            batch_size=batch_size, eval_every=steps, checkpoint_every=steps,
        )  # fmt: skip
        train(config, causal_attention=resolve(ATTENTIONS, attention))
        records = read_metrics(Path(folder) / "metrics.jsonl")
    training = [record for record in records if "loss" in record]
    late = sorted(record["tokens_per_second"] for record in training[len(training) // 2 :])
    return {
        "losses": [record["loss"] for record in training],
        "valid_loss": records[-1]["valid_loss"],
        "tokens_per_s": late[len(late) // 2],
    }


def plot(curves: dict[str, dict], destination: Path) -> None:
    """Draw the curves, and their distances from that of plain attention, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5.6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    styles = {"plain": ("#08519c", 2.5), "flash": ("#e6550d", 1.2), "sdpa-flash": ("#31a354", 0.8)}
    plain = curves["plain"]["losses"]
    steps = range(1, len(plain) + 1)
    for name, (color, width) in styles.items():
        above.plot(steps, curves[name]["losses"], color=color, linewidth=width, label=name)
        if name != "plain":
            differences = [abs(loss - reference) for loss, reference in zip(curves[name]["losses"], plain)]
            below.plot(steps, differences, color=color, linewidth=0.8, label=f"|{name} − plain|")
    above.set(ylabel="training loss (nats per token)")
    below.set(xlabel="step", ylabel="difference (nats)", yscale="log")
    for axes in (above, below):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(destination, dpi=150)


@dataclass(frozen=True)
class Options(Measurement):
    """Compare the training curves of three attentions on Assignment 1's TinyStories model."""

    train_data: tyro.conf.Positional[Path] = Path("data/tinystories/train.npy")
    """Token file to train on, made by `cs336-basics tokenize`."""
    valid_data: tyro.conf.Positional[Path] = Path("data/tinystories/valid.npy")
    """Token file to evaluate on."""
    steps: int = 500
    """Optimizer steps."""
    batch_size: int = 128
    """Sequences per step."""
    small: bool = False
    """Train a tiny model, for a machine without a GPU."""
    name: str = "loss_curves"


def main(options: Options) -> None:
    """Train, print a table, and write a file and a picture."""
    curves: dict[str, dict] = {
        name: curve(name, options.train_data, options.valid_data, options.steps, options.batch_size, options.small)
        for name in COMPARED
    }
    plain = curves["plain"]["losses"]
    rows = []
    for name, found in curves.items():
        differences = [abs(loss - reference) for loss, reference in zip(found["losses"], plain)]
        rows.append({
            "attention": name, "last_loss": found["losses"][-1], "valid_loss": found["valid_loss"],
            "tokens_per_s": found["tokens_per_s"], "mean_difference": sum(differences) / len(differences),
            "max_difference": max(differences),
        })  # fmt: skip
    print_table("Training with each attention; differences are from plain attention, in nats", rows)
    write_result(
        options, f"{options.steps} steps of tinystories-17m with each attention", rows, resolve_device(options.device),
        losses={name: [round(loss, 5) for loss in found["losses"]] for name, found in curves.items()},
    )  # fmt: skip
    plot(curves, options.out / f"{options.name}.png")


if __name__ == "__main__":
    main(tyro.cli(Options))
