"""The metrics of a run."""

import json
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from cs336_alignment.run_folder import read_metrics
from cs336_alignment.runs.run_log import RunLog, describe_environment, step_of


def test_records_are_lines_that_anyone_can_read(tmp_path, capsys):
    with RunLog(tmp_path) as log:
        log.expect(2)
        log.write("train", 1, {"loss": 2.5, "reward": 0.25, "tokens_per_second": 1234.5})
        log.write("eval", 1, {"reward": 0.125})
        log.show_line()
        assert read_metrics(tmp_path / "metrics.jsonl") == [
            {"train_step": 1, "train/loss": 2.5, "train/reward": 0.25, "train/tokens_per_second": 1234.5},
            {"eval_step": 1, "eval/reward": 0.125},
        ]
    assert "step    1  loss 2.5000  reward 0.250  eval 12.5%  1,234 tok/s" in capsys.readouterr().err


def test_resuming_drops_what_comes_again(tmp_path):
    with RunLog(tmp_path) as log:
        for step in range(1, 6):
            log.write("train", step, {"loss": float(step)})
            log.write("eval", step, {"reward": float(step)})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"train_step": 6, "tr')
    with RunLog(tmp_path, resume_after=3) as log:
        assert log.latest == {"train_step": 3, "train/loss": 3.0, "eval_step": 3, "eval/reward": 3.0}
        log.write("train", 4, {"loss": 0.0})
    assert [step_of(record) for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 1, 2, 2, 3, 3, 4]
    with RunLog(tmp_path) as log:
        assert log.latest == {}
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_phases_sum_up_to_the_time_that_went_by(tmp_path):
    with RunLog(tmp_path) as log:
        started = time.perf_counter()
        for _ in range(2):
            with log.phase("evaluation"):
                time.sleep(0.01)
                with log.phase("rollout"):  # part of the evaluation
                    time.sleep(0.02)
        with log.phase("rollout"), pytest.raises(KeyError), log.phase("grading"):
            raise KeyError
        went_by = time.perf_counter() - started
        seconds = log.pop_phase_seconds()
        assert seconds.keys() == {"seconds/evaluation", "seconds/rollout"}
        assert 0.06 <= seconds["seconds/evaluation"] <= sum(seconds.values()) <= went_by
        assert log.pop_phase_seconds() == {}


def test_a_full_disk_is_one_sentence(tmp_path):
    with RunLog(tmp_path) as log:
        log._file.close()
        log._file = open("/dev/full", "w")  # noqa: SIM115
        with pytest.raises(OSError, match=r"metrics\.jsonl \(No space left on device\); free some space"):
            log.write("train", 1, {"loss": 1.0})


def test_wandb_gets_a_copy_when_asked(tmp_path, monkeypatch):
    sent, ended, opened, axes = [], [], [], {}
    run = SimpleNamespace(
        log=sent.append,
        finish=lambda exit_code: ended.append(exit_code),
        define_metric=lambda name, step_metric=None: axes.update({name: step_metric}),
    )
    wandb = SimpleNamespace(init=lambda **options: opened.append(options["id"]) or run)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with RunLog(tmp_path, wandb_project="p") as log:
        log.write("train", 1, {"loss": 2.0})
    assert (sent, ended) == ([{"train_step": 1, "train/loss": 2.0}], [0])
    assert axes == {"train_step": None, "train/*": "train_step", "eval_step": None, "eval/*": "eval_step"}
    with RunLog(tmp_path, wandb_project="p"), RunLog(tmp_path / "other", wandb_project="p"):
        pass
    assert opened[0] == opened[1] != opened[2]  # a resumed run goes on in its own curves


def test_wandb_missing_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="--wandb-project is 'p', but wandb is not installed; add it with"):
        RunLog(tmp_path, wandb_project="p")


def test_the_environment_names_what_ran(monkeypatch):
    monkeypatch.setenv("CS336_COMMIT", "abc")
    found = describe_environment(torch.device("cpu"))
    assert json.loads(json.dumps(found)) == found
    assert found["commit"] == "abc"
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["device"].startswith("cpu, ")
