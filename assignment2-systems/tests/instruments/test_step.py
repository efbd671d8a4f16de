"""The grid, its file, and what happens when memory runs out."""

import dataclasses
import json

import pytest
import torch

from cs336_basics import accounting
from cs336_basics.model import ModelConfig
from cs336_systems.instruments import step as module
from cs336_systems.instruments.options.one_gpu import BenchStep
from cs336_systems.instruments.step import time_step
from cs336_systems.training.step import StepConfig, TrainingStep

CONFIG = StepConfig(ModelConfig(67, 12, d_model=16, num_layers=2, num_heads=2, d_ff=24), torch.device("cpu"), 3)


@pytest.mark.parametrize(("which", "passes"), [("inference", 1), ("forward", 1), ("forward-backward", 3), ("full", 3)])
def test_statistics_and_rates(which, passes):
    row = time_step(CONFIG, which, warmup=1, steps=4)
    times = row["times_ms"]
    assert len(times) == 4
    assert row["mean_ms"] == pytest.approx(sum(times) / 4, abs=1e-3)
    assert min(times) - 1e-3 <= row["median_ms"] <= max(times) + 1e-3
    assert row["std_ms"] == pytest.approx(torch.tensor(times).std().item(), rel=0.01, abs=1e-3)
    seconds = row["median_ms"] / 1e3
    assert row["tok/s"] == pytest.approx(36 / seconds, rel=1e-3)
    assert row["TFLOP/s"] == pytest.approx(passes * accounting.forward_flops(CONFIG.model, 3) / seconds / 1e12)


def test_a_single_step_has_no_deviation():
    assert time_step(CONFIG, "forward", warmup=0, steps=1)["std_ms"] == 0


def test_every_row_starts_with_a_fresh_model_and_compiler(monkeypatch):
    made, resets = [], []
    monkeypatch.setattr(module, "TrainingStep", lambda config: made.append(1) or TrainingStep(CONFIG))
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(1))
    time_step(CONFIG, "forward", warmup=0, steps=1)
    assert (len(made), len(resets)) == (1, 0)
    time_step(dataclasses.replace(CONFIG, mode="compiled-model"), "forward", warmup=0, steps=1)
    assert (len(made), len(resets)) == (2, 1)


def test_grid_and_file(tmp_path, capsys):
    command = BenchStep(
        sizes=("tiny",), contexts=(8, 16), passes=("forward", "full"), warmups=(0, 1), steps=2, device="cpu",
        name="bench", out=tmp_path,
    )  # fmt: skip
    command.execute()
    record = json.loads((tmp_path / "bench.json").read_text())
    assert [(row["context"], row["pass"], row["warmup"]) for row in record["rows"]] == [
        (context, which, warmup) for context in (8, 16) for which in ("forward", "full") for warmup in (0, 1)
    ]
    assert record["batch_size"] == 4
    assert record["steps"] == 2
    assert record["rows"][0]["precision"] == "float32"
    assert {"what", "date", "torch", "device", "command"} <= set(record)
    printed = capsys.readouterr().out
    assert printed.count("written: ") == 1
    assert "size tiny" in printed


def test_out_of_memory_is_a_row(tmp_path, monkeypatch):
    def full_at_16(config):
        if config.model.context_length == 16:
            raise torch.OutOfMemoryError("no memory left")
        return TrainingStep(config)

    monkeypatch.setattr(module, "TrainingStep", full_at_16)
    BenchStep(
        sizes=("tiny",), contexts=(8, 16, 32), passes=("forward",), warmups=(0,), steps=1, device="cpu", out=tmp_path
    ).execute()
    rows = json.loads((tmp_path / "bench_step.json").read_text())["rows"]
    assert [row["status"] for row in rows] == ["ok", "out of memory", "ok"]
    assert rows[1]["context"] == 16
    assert "mean_ms" not in rows[1]


@pytest.mark.parametrize(("wrong", "says"), [({"steps": 0}, "--steps is 0"), ({"warmups": (1, -1)}, "--warmups is -1")])
def test_mistakes_are_one_sentence(wrong, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        BenchStep(device="cpu", out=tmp_path, **wrong).execute()
    assert not list(tmp_path.iterdir())
