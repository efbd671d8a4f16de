"""The command in two processes, and predictions for any number."""

import json

import pytest

from cs336_basics.accounting import parameter_counts
from cs336_systems.instruments import ranks
from cs336_systems.instruments.options.many_gpus import BenchSharding
from cs336_systems.instruments.ranks import StepTimes
from cs336_systems.instruments.sharding import summarize
from cs336_systems.training.choices import model_config

SMALL = {"size": "tiny", "context": 16, "batch_size": 2, "warmup": 1, "steps": 2, "device": "cpu"}
PARAMETERS = sum(parameter_counts(model_config("tiny", 16)).values())


def test_grid_and_file(workers, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ranks, "run_on_ranks", lambda f, n, *args, **_: workers.run(f, n, *args, timeout_s=240))
    BenchSharding(processes=2, out=tmp_path, **SMALL).execute()
    record = json.loads((tmp_path / "bench_sharding.json").read_text())
    assert [(row["optimizer"], row["sharding"], row["status"]) for row in record["rows"]] == [
        (optimizer, sharding, "ok") for optimizer in ("basics", "torch") for sharding in ("none", "ours", "torch")
    ]
    for row in record["rows"]:
        assert sum(row["states_MB"]) == pytest.approx(
            8e-6 * PARAMETERS * (2 if row["sharding"] == "none" else 1), rel=1e-3
        )
        assert row["state_MB"] == pytest.approx(row["predicted_state_MB"], rel=0.1)
        assert row["least_state_MB"] == min(row["states_MB"])
        assert 0 < row["optimizer_ms"] < row["step_ms"]
        assert "peak_GB" not in row
    assert "peaks of memory are not measured" in capsys.readouterr().out


def test_predictions_and_the_fullest_process():
    options = BenchSharding(processes=4, **SMALL)
    measured = [
        {"init_GB": 1.0, "held_GB": held, "state_MB": state, "times": [StepTimes(4.0, 1.0, 1.0, 2.0)]}
        for held, state in ((3.0, 10.0), (5.0, 8.0))
    ]
    row = summarize(options, {"optimizer": "basics", "sharding": "ours"}, measured)
    assert (row["init_GB"], row["held_GB"], row["state_MB"], row["least_state_MB"]) == (1, 5, 10, 8)
    assert row["predicted_state_MB"] == pytest.approx(8 * PARAMETERS / 4 / 1e6)
    assert row["predicted_held_GB"] == pytest.approx((8 + 8 / 4) * PARAMETERS / 1e9)
    assert (row["optimizer_ms"], row["step_ms"]) == (2, 4)
    whole = summarize(options, {"optimizer": "basics", "sharding": "none"}, measured)
    assert whole["predicted_held_GB"] == pytest.approx(16 * PARAMETERS / 1e9)
