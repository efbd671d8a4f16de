"""Does training follow the same curve with our FlashAttention? Assignment 1's TinyStories model, three times.

    python -m benchmarks.loss_curves TRAIN.npy VALID.npy [--steps 500] [--out results]

With plain attention, with ours, and with PyTorch's FlashAttention-2, from the same weights over the same batches, in
bfloat16 and compiled. The first and the last differ by rounding alone, which is the yardstick for the second.
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from cs336_basics.presets import TRAIN
from cs336_basics.run_log import read_metrics
from cs336_basics.training import train
from cs336_systems.attention import AttentionName, causal_attention
from cs336_systems.measure import show, write_result

ATTENTIONS: tuple[AttentionName, ...] = ("plain", "flash", "sdpa-flash")


def curve(
    attention: AttentionName, train_data: Path, valid_data: Path, steps: int, batch_size: int, small: bool
) -> dict:
    """Training losses of every step, the last validation loss, and the median tokens per second of the later half."""
    config = TRAIN["tinystories-17m"][1]
    if small:  # to try this program on a CPU
        config = replace(config, model=replace(config.model, d_model=64, num_layers=2, num_heads=4), compile=False)
    with tempfile.TemporaryDirectory() as folder:
        config = replace(
            config, run=Path(folder), train_data=train_data, valid_data=valid_data, steps=steps, batch_size=batch_size,
            eval_every=steps, checkpoint_every=steps,
        )  # fmt: skip
        train(config, causal_attention=causal_attention(attention))
        records = read_metrics(Path(folder) / "metrics.jsonl")
    training = [record for record in records if "loss" in record]
    late = sorted(record["tokens_per_second"] for record in training[len(training) // 2 :])
    return {
        "losses": [record["loss"] for record in training],
        "valid_loss": records[-1]["valid_loss"],
        "tokens_per_s": late[len(late) // 2],
    }


def plot(curves: dict[str, dict], destination: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, figsize=(7, 5.6), sharex=True, layout="constrained")
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
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train_data", type=Path)
    parser.add_argument("valid_data", type=Path)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--small", action="store_true", help="a tiny model, for a machine without a GPU")
    parser.add_argument("--out", type=Path, default=Path("results"))
    arguments = parser.parse_args()
    curves: dict[str, dict] = {
        name: curve(name, arguments.train_data, arguments.valid_data, arguments.steps, arguments.batch_size,
                    arguments.small)
        for name in ATTENTIONS
    }  # fmt: skip
    plain = curves["plain"]["losses"]
    rows = []
    for name, found in curves.items():
        differences = [abs(loss - reference) for loss, reference in zip(found["losses"], plain)]
        rows.append({
            "attention": name, "last_loss": found["losses"][-1], "valid_loss": found["valid_loss"],
            "tokens_per_s": found["tokens_per_s"], "mean_difference": sum(differences) / len(differences),
            "max_difference": max(differences),
        })  # fmt: skip
    show("Training with each attention; differences are from plain, in nats", rows)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    write_result(
        arguments.out, "loss_curves", f"{arguments.steps} steps of tinystories-17m with each attention", rows, device,
        losses={name: [round(loss, 5) for loss in found["losses"]] for name, found in curves.items()},
    )  # fmt: skip
    plot(curves, arguments.out / "loss_curves.png")


if __name__ == "__main__":
    main()
