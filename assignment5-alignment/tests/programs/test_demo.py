"""The demonstration in miniature: every stage, resumed where it was interrupted."""

import json
from dataclasses import replace

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pytest

from cs336_alignment.datasets.demonstrations import load_demonstrations
from cs336_alignment.datasets.examples import load_examples
from cs336_alignment.datasets.overlap import find_overlap
from cs336_alignment.programs import demo
from cs336_alignment.run_folder import read_metrics

TINY = {"sft_examples": 64, "sft_epochs": 1, "grpo_steps": 2, "rollout_batch_size": 16, "held_out": 16}


@pytest.fixture
def config(tmp_path):
    return demo.DemoConfig(run_dir=tmp_path / "demo", **TINY)


def test_every_stage_leaves_its_files(config, capsys):
    result = demo.run_demo(config)
    run = config.run_dir
    assert (run / "rewards.png").read_bytes().startswith(b"\x89PNG")
    evaluations = [each for each in read_metrics(run / "grpo" / "metrics.jsonl") if "eval_step" in each]
    assert [each["eval_step"] for each in evaluations] == [0, 1, 2]
    assert (result.sft_accuracy, result.grpo_accuracy) == (evaluations[0]["eval/reward"], evaluations[2]["eval/reward"])
    assert len([each for each in read_metrics(run / "sft" / "metrics.jsonl") if "train_step" in each]) == 2
    out = capsys.readouterr().out
    assert f"{result.sft_accuracy:.1%} after imitation, {result.grpo_accuracy:.1%} after GRPO" in " ".join(out.split())
    assert "What to run next" in out

    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")}
    assert demo.run_demo(config) == result  # complete: nothing is trained again
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")} == before


def test_an_interrupted_demo_goes_on_to_the_same_result(config, tmp_path, monkeypatch):
    whole = demo.run_demo(config)

    def interrupt(*_):
        raise KeyboardInterrupt

    other = replace(config, run_dir=tmp_path / "other")
    with monkeypatch.context() as patch:
        patch.setattr(demo, "train_grpo", interrupt)
        with pytest.raises(KeyboardInterrupt):
            demo.run_demo(other)
    assert demo.run_demo(other) == whole


def test_the_data_is_what_the_text_says(config):
    demo.prepare(replace(config, sft_examples=1000))
    data = config.run_dir / "data"
    rewarded, held_out = (load_examples(data / f"{name}.jsonl") for name in ("train", "held_out"))
    imitated = load_demonstrations(data / "sft.jsonl")
    questions = {row.prompt.removesuffix(" <think>") for row in imitated}
    assert len(questions) == 1000
    assert not questions & {each.prompt for each in rewarded}
    assert not questions & {each.prompt for each in held_out}
    assert not find_overlap(rewarded, held_out)
    worked = sum(not row.response.startswith(" </think>") for row in imitated)
    assert 250 <= worked <= 350  # three tenths
    assert all(row.response.endswith("</answer>") for row in imitated)


def test_another_demo_in_the_same_folder_is_refused(config):
    demo.prepare(config)
    assert json.loads((config.run_dir / "data" / "config.json").read_text())["seed"] == 0
    with pytest.raises(ValueError, match="holds a demo with other settings"):
        demo.prepare(replace(config, seed=1))


# --- The plot of a run, from its metrics ---------------------------------------------------------------------------

RECORDS = [
    {"eval_step": 0, "eval/reward": 0.25, "eval/response_length": 9.0},
    {"train_step": 1, "train/reward": 0.5, "train/response_length": 10.0, "train/loss": 1.0},
    {"train_step": 2, "train/skipped": 1},
    {"eval_step": 2, "eval/reward": 0.75, "eval/response_length": 12.0},
]


@pytest.fixture
def drawn(monkeypatch):
    """The lines of all axes, read before the figure is closed."""
    lines = []

    def read(figure):
        lines.extend([[line.get_xydata().tolist() for line in axes.get_lines()] for axes in figure.axes])

    monkeypatch.setattr(plt, "close", read)
    return lines


def test_rewards_and_lengths_against_updates(tmp_path, drawn):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    demo.plot_rewards(tmp_path, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert drawn == [[[[1, 0.5]], [[0, 0.25], [2, 0.75]]], [[[1, 10.0]], [[0, 9.0], [2, 12.0]]]]


def test_a_run_without_evaluations(tmp_path, drawn):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(RECORDS[1]) + "\n")
    demo.plot_rewards(tmp_path, tmp_path / "plot.png")
    assert drawn == [[[[1, 0.5]]], [[[1, 10.0]]]]
