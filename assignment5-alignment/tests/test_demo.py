"""The demonstration in miniature: every stage, resumed where it was interrupted."""

import json
from dataclasses import replace

import pytest

from cs336_alignment import demo
from cs336_alignment.datasets import find_overlap, load_examples, load_sft
from cs336_alignment.run_log import read_metrics

TINY = {"sft_examples": 64, "sft_epochs": 1, "grpo_steps": 2, "rollout_batch_size": 16, "held_out": 16}


@pytest.fixture
def config(tmp_path):
    return demo.DemoConfig(run=tmp_path / "demo", **TINY)


def test_every_stage_leaves_its_files(config, capsys):
    result = demo.run_demo(config)
    run = config.run
    assert (run / "rewards.png").read_bytes().startswith(b"\x89PNG")
    evaluations = [each for each in read_metrics(run / "grpo" / "metrics.jsonl") if "eval_step" in each]
    assert [each["eval_step"] for each in evaluations] == [0, 1, 2]
    assert (result.sft_accuracy, result.grpo_accuracy) == (evaluations[0]["eval/reward"], evaluations[2]["eval/reward"])
    assert len([each for each in read_metrics(run / "sft" / "metrics.jsonl") if "train_step" in each]) == 2
    out = capsys.readouterr().out
    assert f"{result.sft_accuracy:.1%} after imitation, {result.grpo_accuracy:.1%} after GRPO" in " ".join(out.split())
    assert "What to run next" in out

    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")}
    assert demo.run_demo(config) == result  # complete: nothing is trained anew
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")} == before


def test_an_interrupted_demo_goes_on_to_the_same_result(config, tmp_path, monkeypatch):
    whole = demo.run_demo(config)

    def interrupt(*_):
        raise KeyboardInterrupt

    other = replace(config, run=tmp_path / "other")
    with monkeypatch.context() as patch:
        patch.setattr(demo, "train_grpo", interrupt)
        with pytest.raises(KeyboardInterrupt):
            demo.run_demo(other)
    assert demo.run_demo(other) == whole


def test_the_data_is_what_the_text_says(config):
    demo.prepare(replace(config, sft_examples=1000))
    data = config.run / "data"
    rewarded, held_out = (load_examples(data / f"{name}.jsonl") for name in ("train", "held_out"))
    imitated = load_sft(data / "sft.jsonl")
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
    assert json.loads((config.run / "data" / "config.json").read_text())["seed"] == 0
    with pytest.raises(ValueError, match="holds a demo with other settings"):
        demo.prepare(replace(config, seed=1))
