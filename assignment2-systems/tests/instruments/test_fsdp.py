"""The command in two processes, rows that cannot be, and predictions."""

import json

import pytest
import torch

from cs336_basics.accounting import parameter_counts
from cs336_systems.instruments import ranks
from cs336_systems.instruments.fsdp import measure_fsdp, predicted
from cs336_systems.instruments.measure import ResultFile
from cs336_systems.instruments.options.many_gpus import BenchFsdp
from cs336_systems.training.choices import model_config

SMALL = {"size": "tiny", "context": 16, "batch_size": 2, "warmup": 1, "steps": 2, "device": "cpu"}
COUNTS = parameter_counts(model_config("tiny", 16))


def test_grid_and_file(workers, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ranks, "run_on_ranks", lambda f, n, *args, **_: workers.run(f, n, *args, timeout_s=240))
    BenchFsdp(processes=2, precision="bfloat16", out=tmp_path, **SMALL).execute()
    record = json.loads((tmp_path / "bench_fsdp.json").read_text())
    assert [(row["checkpointing"], row["variant"], row["status"]) for row in record["rows"]] == [
        (checkpointing, variant, "ok")
        for checkpointing in ("none", "block")
        for variant in ("bucketed", "fsdp", "fsdp-linear", "fully-shard")
    ]
    for row in record["rows"]:
        assert row["tok/s"] == pytest.approx(2 * 2 * 16 / row["step_ms"] * 1e3)
    assert "mode eager" in capsys.readouterr().out


def test_what_cannot_be_is_a_row_and_the_next_one_is_measured(workers, tmp_path):
    options = BenchFsdp(processes=1, out=tmp_path, **SMALL)
    cases = [
        {"mode": "compiled-blocks", "checkpointing": "none", "variant": "fsdp-linear"},
        {"mode": "eager", "checkpointing": "none", "variant": "fsdp"},
    ]
    file = ResultFile(tmp_path, "x", "x", torch.device("cpu"))
    (rows,) = workers.run(measure_fsdp, 1, options, ranks.step_config(options, torch.device("cpu")), cases, file)
    assert [row["status"] for row in rows] == ["unsupported", "ok"]
    assert "cannot be compiled as a whole" in rows[0]["reason"]
    assert json.loads((tmp_path / "x.json").read_text())["rows"] == rows


def test_predictions():
    """Of 4 processes each sends 3/4 of what it does not keep, and keeps a quarter of what is sharded."""
    total, norms = sum(COUNTS.values()), COUNTS["norms"]
    options = BenchFsdp(processes=4, precision="bfloat16", **SMALL)
    held, sent = predicted(options, "bucketed")
    assert (held, sent) == (16 * total, pytest.approx(2 * 3 / 4 * 4 * total))
    held, sent = predicted(options, "fully-shard")
    assert (held, sent) == (16 / 4 * total, pytest.approx(3 * 3 / 4 * 2 * total))
    for variant in ("fsdp", "fsdp-linear"):
        held, sent = predicted(options, variant)
        assert held == pytest.approx(16 / 4 * (total - norms) + 16 * norms)
        assert sent == pytest.approx(3 * 3 / 4 * 2 * (total - norms) + 2 * 3 / 4 * 4 * norms)
