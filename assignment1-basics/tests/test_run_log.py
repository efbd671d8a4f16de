"""The record of a run."""

import json
import sys
from types import SimpleNamespace

import pytest

from cs336_basics.plots import plot_loss
from cs336_basics.run_folder import read_metrics
from cs336_basics.run_log import RunLog


def test_records_are_lines_that_anyone_can_read(tmp_path, capsys):
    with RunLog(tmp_path, total_steps=2) as log:
        log.write([{"step": 1, "loss": 2.5, "lr": 0.1, "tokens": 8, "tokens_per_second": 1234.5}])
        log.write([{"step": 1, "valid_loss": 2.0}])
        log.show_line()
        assert read_metrics(tmp_path / "metrics.jsonl") == [
            json.loads(line) for line in (tmp_path / "metrics.jsonl").open()
        ]
    assert "step 1  loss 2.500  valid 2.000  lr 1.0e-01  1,234 tok/s" in capsys.readouterr().err
    plot_loss(tmp_path, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_resuming_drops_what_comes_again(tmp_path):
    with RunLog(tmp_path, 5) as log:
        log.write([{"step": step, "loss": float(step)} for step in range(1, 6)])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')
    with RunLog(tmp_path, 5, start_step=3) as log:
        assert log.latest == {"step": 3, "loss": 3.0}
        log.write([{"step": 4, "loss": 0.0}])
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def test_wandb_gets_a_copy_when_asked(tmp_path, monkeypatch):
    sent, ended, opened = [], [], []
    run = SimpleNamespace(
        log=lambda values, step: sent.append((step, values)), finish=lambda exit_code: ended.append(exit_code)
    )
    wandb = SimpleNamespace(init=lambda **options: opened.append(options["id"]) or run)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with RunLog(tmp_path, 2, wandb_project="p") as log:
        log.write([{"step": 1, "loss": 2.0}])
    assert (sent, ended) == ([(1, {"loss": 2.0})], [0])
    with RunLog(tmp_path, 2, wandb_project="p"), RunLog(tmp_path / "other", 2, wandb_project="p"):
        pass
    assert opened[0] == opened[1] != opened[2]  # a resumed run goes on in its own curve


def test_wandb_missing_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="--wandb-project is 'p', but wandb is not installed; add it with"):
        RunLog(tmp_path, 2, wandb_project="p")
