"""The experiments, with models and corpora of a moment."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from experiments import models, sweep
from experiments.accounting_tables import AccountingTables
from experiments.benchmarks import throughput
from experiments.learning_rate_tuning import LearningRateTuning
from experiments.results import FOLDERS, RESULTS, read_result, result_path, write_result
from experiments.samples import SETTINGS, Samples
from experiments.sweep import Run, measured, run_all, run_here
from experiments.tokenizer_experiments import TokenizerExperiments
from experiments.train_bpe import TrainBPE

from cs336_basics.data import write_tokens
from cs336_basics.model_config import ModelConfig
from cs336_basics.presets import TRAIN
from cs336_basics.tokenizer import Tokenizer
from cs336_basics.train_config import OptimizerConfig, TrainConfig
from cs336_basics.training import train

TINY = ModelConfig(50, 8, 16, 1, 2, 16)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    rng = np.random.default_rng(0)
    for name in ("train", "valid"):
        write_tokens(folder / f"{name}.npy", [rng.integers(50, size=500)], 50)
    return folder


@pytest.fixture
def config(data):
    return TrainConfig(
        train_data=data / "train.npy", valid_data=data / "valid.npy", model=TINY, steps=6, batch_size=4, eval_every=3,
        device="cpu", optimizer=OptimizerConfig(warmup_steps=1),
    )  # fmt: skip


def test_runs_are_recorded_and_not_done_twice(config, tmp_path, capsys):
    runs = [
        Run("problem", "one", config),
        Run("problem", "diverges", replace(config, optimizer=OptimizerConfig(lr=1e30, warmup_steps=0))),
    ]
    run_all(runs, tmp_path / "runs", tmp_path, workers=1, minutes=5)
    rows = read_result("problem", tmp_path)["rows"]
    assert [row["name"] for row in rows] == ["one", "diverges"]
    assert rows[0]["status"] == "finished"
    assert rows[0]["steps_done"] == 6
    assert rows[0]["valid_curve"]["step"] == [3, 6]
    assert rows[1]["status"].startswith("diverged")
    assert not {"run_dir", "train_data"} & {*rows[0]["config"]}  # paths of this machine

    before = (tmp_path / "problem.json").read_text()
    run_all(runs, tmp_path / "runs", tmp_path, workers=1, minutes=5)
    assert (tmp_path / "problem.json").read_text() == before
    changed = [replace(runs[0], config=replace(config, seed=1)), runs[1]]
    run_all(changed, tmp_path / "elsewhere", tmp_path, workers=1, minutes=5)
    after = read_result("problem", tmp_path)["rows"]
    assert [row["config"]["seed"] for row in after] == [1, 0]
    assert after[1] == rows[1]
    assert "2 runs, of which 1 are in" in capsys.readouterr().out


def test_curves_take_one_line_and_nothing_else_changes(tmp_path):
    content = {
        "curve": {"loss": [9.5, None, 1e-05, float("inf")], "step": [1, 2]},
        "rows": [{"text": "[\n1,\n 2]", "nested": [[1, 2], [], ["a", "b"]]}],
    }
    path = write_result("curves", "a test", content, tmp_path)
    read = read_result("curves", tmp_path)
    assert {key: read[key] for key in content} == content
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    assert '"loss": [9.5, null, 1e-05, Infinity],' in lines
    assert "[1, 2]," in lines


def test_nothing_begins_after_the_deadline(config, tmp_path, capsys):
    run_all([Run("problem", "late", config)], tmp_path / "runs", tmp_path, workers=1, minutes=-1)
    assert not (tmp_path / "problem.json").exists()
    assert "not started within -1 minutes: problem/late" in capsys.readouterr().out


def test_what_is_kept_of_a_curve():
    records = [
        {"step": step, "loss": float(step), "grad_norm": 1.0, "tokens": 10 * step, "seconds": step / 2,
         "tokens_per_second": 20.0 if step > 50 else 1.0}
        for step in range(1, 301)
    ]  # fmt: skip
    records.insert(150, {"step": 150, "valid_loss": 2.0})
    records.append({"step": 300, "valid_loss": 3.0})
    kept = measured(records)
    assert kept["curve"]["step"] == [*range(3, 301, 3)]
    assert kept["curve"]["loss"][0] == 2.0
    assert kept["train_loss"] == pytest.approx(np.mean([*range(251, 301)]))
    assert (kept["valid_loss"], kept["best_valid_loss"]) == (3.0, 2.0)
    assert kept["tokens_per_second"] == 20.0
    assert measured([])["train_loss"] is None


def test_every_run_of_the_problems_is_distinct():
    setting = models.TrainModels()
    for name, problem in models.PROBLEMS.items():
        runs = list(problem(setting))
        assert {run.problem for run in runs} == {name}
        assert len({run.name for run in runs}) == len(runs) >= 2
        assert len({json.dumps(sweep.summary(run.config)) for run in runs}) == len(runs)


def test_a_run_against_the_clock(config, tmp_path):
    config = replace(config, steps=100, eval_every=100, optimizer=OptimizerConfig(warmup_steps=10))
    run = Run("problem", "clock", config, seconds=4.0)
    row = run_here(run, tmp_path / "runs", tmp_path)
    steps = row["config"]["steps"]
    assert sweep.PROBE_STEPS <= steps == row["steps_done"]
    assert row["config"]["optimizer"]["warmup_steps"] == round(steps / 10)
    assert not (tmp_path / "runs/problem/clock/checkpoints").exists()
    assert run_here(run, tmp_path / "runs", tmp_path) == row
    with pytest.raises(ValueError, match=r"0\.001 s are too short for clock, whose step takes"):
        run_here(replace(run, seconds=0.001), tmp_path / "runs", tmp_path)
    with pytest.raises(ValueError, match=r"FlashAttention is Assignment 2's"):
        run_here(replace(run, attention="flash"), tmp_path / "runs", tmp_path)


def test_train_models_on_a_cpu(data, tmp_path, monkeypatch):
    tiny = replace(TRAIN["tinystories-17m"][1], model=TINY, compile=False, precision="float32", batch_size=4)
    monkeypatch.setitem(models.TRAIN, "tinystories-17m", ("tiny", tiny))
    setting = models.TrainModels(
        ("token_budget",), tinystories=data, steps=4, device="cpu", runs=tmp_path / "runs", out=tmp_path
    )
    setting.execute()
    rows = read_result("token_budget", tmp_path)["rows"]
    assert [row["steps_done"] for row in rows] == [1, 2, 4, 10]
    assert all(row["valid_loss"] < 5 for row in rows)
    with pytest.raises(ValueError, match="no problem 'token'; there are token_budget"):
        models.TrainModels(("token",))


def test_tokenizers(tmp_path):
    text = tmp_path / "text.txt"
    words = ["low lower lowest", "new newer newest", "wide wider widest"]
    text.write_text("".join(f"{words[i % 3]} {i}\n<|endoftext|>\n" for i in range(60)))
    counts = tmp_path / "counts.tsv"
    counts.write_text("".join(f"{word.encode().hex()}\t{count}\n" for word, count in {" low": 5, " newest": 6}.items()))
    TrainBPE(counts, text, 262, 280, tokenizers=tmp_path / "tokenizers", out=tmp_path).execute()
    result = read_result("train_bpe", tmp_path)
    assert result["tinystories"]["pre-tokens"] == 11
    assert result["broad"]["tokens"] == 280
    assert result["broad"]["peak_MB"] > 10
    TokenizerExperiments(text, text, tokenizers=tmp_path / "tokenizers", out=tmp_path, samples=5).execute()
    rows = read_result("tokenizer_experiments", tmp_path)["rows"]
    assert [(row["corpus"], row["tokenizer"]) for row in rows] == [
        ("tinystories", "tinystories"), ("tinystories", "broad"), ("broad", "tinystories"), ("broad", "broad"),
    ]  # fmt: skip
    assert rows[1]["of_all_documents"] > rows[0]["of_all_documents"] > 1
    assert all(row["of_all_draws_lowest"] <= row["bytes_per_token"] <= row["of_all_draws_highest"] for row in rows)


def test_throughput_on_a_cpu(data, tmp_path, monkeypatch):
    tiny = replace(TRAIN["tinystories-17m"][1], model=TINY, compile=False, precision="float32", batch_size=4)
    monkeypatch.setitem(throughput.TRAIN, "tinystories-17m", ("tiny", tiny))
    throughput.Throughput(data, steps=20, profiled=2, device="cpu", out=Path(tmp_path)).execute()
    assert read_result("throughput", tmp_path)["tokens_per_second"] > 0


def test_samples(data, tmp_path, config):
    Tokenizer({i: bytes([97 + i]) for i in range(26)} | {26 + i: bytes([65 + i]) for i in range(23)}
              | {49: b"<|endoftext|>"}, [], ["<|endoftext|>"]).save(tmp_path / "tokenizer")  # fmt: skip
    train(replace(config, run_dir=tmp_path / "problem" / "run", tokenizer=tmp_path / "tokenizer"))
    Samples((tmp_path / "problem" / "run",), ("abc",), tokens=5, device="cpu", out=tmp_path).execute()
    rows = read_result("samples", tmp_path)["rows"]
    assert [(row["temperature"], row["top_p"]) for row in rows] == [*SETTINGS]
    assert {row["run"] for row in rows} == {"problem/run"}
    assert all(row["tokens"] <= 5 for row in rows)
    assert len({row["text"] for row in rows}) > 1


def test_toy_descent_is_the_recurrence(tmp_path):
    """The gradient of the mean of 100 squares is w / 50, so that each step multiplies the weights."""
    LearningRateTuning((10.0, 1000.0), steps=4, out=tmp_path).execute()
    for row in read_result("learning_rate_tuning", tmp_path)["rows"]:
        expected = row["losses"][0]
        for step, loss in enumerate(row["losses"]):
            assert loss == pytest.approx(expected, rel=1e-5)
            expected *= (1 - row["lr"] / 50 / (step + 1) ** 0.5) ** 2


def test_accounting_of_xl(tmp_path):
    AccountingTables(out=tmp_path).execute()
    result = read_result("accounting", tmp_path)
    xl = result["models"]["gpt2-xl"]
    assert xl["parameters"] == 2_127_057_600
    assert sum(xl["matmuls"].values()) == xl["forward_flops"]
    assert sum(result["xl_long_context"]["shares"].values()) == pytest.approx(1)
    fixed, each = (result["xl_training"][key] for key in ("fixed_bytes", "activation_bytes_per_sequence"))
    batch = result["xl_training"]["largest_batch"]
    assert fixed + batch * each <= 80e9 < fixed + (batch + 1) * each


def test_as_many_steps_as_fit(config, monkeypatch):
    """By hand: 40 steps take 20 s, all else 2 s an evaluation; 96 % of 300 s are 288, and 5 evaluations leave 278."""
    clock = iter([0.0, 500.0, 1000.0, 1022.0])  # the first probe compiles
    monkeypatch.setattr(sweep, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr(sweep, "train", lambda probe, **_: probe.run_dir.mkdir(parents=True))
    monkeypatch.setattr(sweep, "read_metrics", lambda _: [{"seconds": 20.0}, {"valid_loss": 1.0}])
    config = replace(config, steps=100, eval_every=20, optimizer=OptimizerConfig(warmup_steps=10, decay_steps=50))
    fitted = sweep._as_many_steps_as_fit(Run("problem", "clock", config, seconds=300.0), 300.0, None)
    assert fitted.steps == 556
    assert (fitted.optimizer.warmup_steps, fitted.optimizer.decay_steps, fitted.eval_every) == (56, 278, 111)
    clock = iter([0.0, 500.0, 1000.0, 1022.0])
    with pytest.raises(ValueError, match=r"10 s are too short for clock, whose step takes 0\.500 s"):
        sweep._as_many_steps_as_fit(Run("problem", "clock", config, seconds=10.0), 10.0, None)


def test_a_run_against_the_clock_that_is_late_or_fails(config, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "_as_many_steps_as_fit", lambda run, *_: run.config)
    row = run_here(Run("problem", "late", config, seconds=1e-9), tmp_path / "runs", tmp_path)
    assert row["status"] == "out of time"
    wild = replace(config, optimizer=OptimizerConfig(lr=1e30, warmup_steps=0))
    row = run_here(Run("problem", "wild", wild, seconds=100.0), tmp_path / "runs", tmp_path)
    assert row["status"].startswith("diverged")
    assert json.loads((tmp_path / "problem.json").read_text())["device"] == row["device"]


def test_every_result_is_in_its_folder():
    stored = sorted(RESULTS.rglob("*.json"))
    assert {path.stem for path in stored} == {name for names in FOLDERS.values() for name in names}
    assert all(path == result_path(path.stem) for path in stored)
