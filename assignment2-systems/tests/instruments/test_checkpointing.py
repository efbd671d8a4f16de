"""What checkpointing measures: saved bytes by hand, forward passes, and the rows of the results file."""

import dataclasses
import json
import math

import pytest
import torch

from cs336_basics.model import ModelConfig
from cs336_systems.instruments import checkpointing
from cs336_systems.instruments.checkpointing import measure_checkpointing, saved_bytes
from cs336_systems.instruments.options.one_gpu import Checkpointing
from cs336_systems.training.choices import model_config
from cs336_systems.training.step import StepConfig

SHAPE = ModelConfig(vocab_size=67, context_length=16, d_model=16, num_layers=5, num_heads=2, d_ff=24)
CONFIG = StepConfig(SHAPE, torch.device("cpu"), batch_size=2)


def with_blocks(count):
    return dataclasses.replace(CONFIG, model=dataclasses.replace(SHAPE, num_layers=count))


def test_saved_bytes_of_a_product_by_hand():
    x, weight = torch.randn(10, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)
    # x @ weight saves both, of which weight is a parameter; sigmoid saves its output; a sum nothing.
    assert saved_bytes(lambda: (x @ weight).sigmoid().sum(), [weight]) == 2 * 10 * 4 * 4
    assert saved_bytes(lambda: (x * x) * x, []) == 2 * 10 * 4 * 4  # x once, and x²


@pytest.mark.parametrize(("strategy", "forwards"), [("none", 1), ("block", 2), ("group", 2), ("nested", 3)])
def test_forward_passes_per_block(strategy, forwards):
    """Nested: 1 + (log₂ N + 1) / 2."""
    row = measure_checkpointing(with_blocks(8), strategy, None, warmup=0, steps=1)
    assert row["forwards"] == forwards
    assert row["step_ms"] > 0
    assert "peak_MB" not in row
    assert math.isclose(row["saved_MB"], row["predicted_saved_MB"], rel_tol=0.02)


def test_file_with_a_row_where_memory_ran_out(tmp_path, monkeypatch, capsys):
    measure = measure_checkpointing

    def full_without(config, strategy, *rest):
        if strategy == "none":
            raise torch.OutOfMemoryError("no memory left")
        return measure(config, strategy, *rest)

    monkeypatch.setattr(checkpointing, "measure_checkpointing", full_without)
    Checkpointing(sizes=("tiny",), contexts=(16,), warmup=0, steps=1, device="cpu", out=tmp_path).execute()
    rows = json.loads((tmp_path / "checkpointing.json").read_text())["rows"]
    assert [(row["strategy"], row["status"]) for row in rows] == [
        ("none", "out of memory"), ("group", "ok"), ("block", "ok"), ("nested", "ok")
    ]  # fmt: skip
    assert "out of memory" in capsys.readouterr().out


@pytest.mark.gpu
def test_peak_on_the_gpu():
    config = StepConfig(model_config("small", 512), torch.device("cuda"))
    rows = {
        name: measure_checkpointing(config, name, None, warmup=0, steps=1)
        for name in ("none", "group", "block", "nested")
    }
    for row in rows.values():
        assert row["saved_MB"] == pytest.approx(row["predicted_saved_MB"], rel=0.02)
        assert row["predicted_peak_MB"] * 0.98 < row["peak_MB"] < 1.8 * row["predicted_peak_MB"]
    assert rows["none"]["peak_MB"] > rows["group"]["peak_MB"] > rows["block"]["peak_MB"]
