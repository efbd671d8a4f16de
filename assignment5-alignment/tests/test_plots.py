"""The plot of a run, from its metrics."""

import json

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pytest

from cs336_alignment.plots import plot_rewards

RECORDS = [
    {"eval_step": 0, "eval/reward": 0.25, "eval/response_length": 9.0},
    {"train_step": 1, "train/reward": 0.5, "train/response_length": 10.0, "train/loss": 1.0},
    {"train_step": 2, "train/skipped": 1},
    {"eval_step": 2, "eval/reward": 0.75, "eval/response_length": 12.0},
]


@pytest.fixture
def drawn(monkeypatch):
    """The lines of the axes that are drawn, read before the figure is closed."""
    lines = []

    def read(figure):
        lines.extend([[line.get_xydata().tolist() for line in axes.get_lines()] for axes in figure.axes])

    monkeypatch.setattr(plt, "close", read)
    return lines


def test_rewards_and_lengths_against_updates(tmp_path, drawn):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    plot_rewards(tmp_path, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert drawn == [[[[1, 0.5]], [[0, 0.25], [2, 0.75]]], [[[1, 10.0]], [[0, 9.0], [2, 12.0]]]]


def test_a_run_without_evaluations(tmp_path, drawn):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(RECORDS[1]) + "\n")
    plot_rewards(tmp_path, tmp_path / "plot.png")
    assert drawn == [[[[1, 0.5]]], [[[1, 10.0]]]]
