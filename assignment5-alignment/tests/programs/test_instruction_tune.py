"""Instruction tuning: its losses equal torch's, it learns, it resumes, and mistakes are reported."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from cs336_alignment.datasets.packing import PackedSftDataset
from cs336_alignment.policy.config import OptimizerConfig
from cs336_alignment.policy.loading import load_model, load_tokenizer
from cs336_alignment.policy.tiny_model import make_tiny_model
from cs336_alignment.programs.configs.instruction_tune import InstructionTuneConfig
from cs336_alignment.programs.instruction_tune import instruction_tune
from cs336_alignment.run_folder import read_metrics
from cs336_alignment.runs.checkpoint import checkpoints
from tests.programs.test_sft import PowerCutError, assert_same_weights, cut_power_at, timeless
from tests.tiny_task import write_rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("instructions")
    make_tiny_model(folder / "model", hidden_size=32, layers=1, context_length=256, initializer_range=0.1)
    for name, numbers in (("train", range(20)), ("test", range(30, 34))):
        rows = [{"prompt": f"What follows {n}?", "response": f"After {n} comes {n + 1}."} for n in numbers]
        write_rows(folder / f"{name}.jsonl", rows)
    return folder


@pytest.fixture
def config(folder, tmp_path):
    return InstructionTuneConfig(
        run_dir=tmp_path / "run", model=str(folder / "model"), device="cpu", precision="float32",
        train_data=folder / "train.jsonl", eval_data=folder / "test.jsonl", eval_every=4, seq_length=64, batch_size=8,
        checkpoint_every=3, optimizer=OptimizerConfig(lr=1e-2, schedule="cosine", gradient_accumulation_steps=2),
    )  # fmt: skip


def stacked(dataset, indices, name):
    return torch.stack([dataset[index][name] for index in indices])


def test_the_defaults_are_the_courses():
    config = InstructionTuneConfig()
    assert (config.seq_length, config.batch_size, config.epochs) == (512, 32, 1)
    optimizer = config.optimizer
    assert (optimizer.lr, optimizer.schedule, optimizer.warmup_ratio) == (2e-5, "cosine", 0.03)


def test_it_learns(config):
    latest = instruction_tune(replace(config, epochs=5))
    records = read_metrics(config.run_dir / "metrics.jsonl")
    losses = [record["train/loss"] for record in records if "train_step" in record]
    evaluations = {record["eval_step"]: record["eval/loss"] for record in records if "eval_step" in record}
    assert losses[0] > 5  # log 262 is 5.57
    assert losses[-1] < 3
    assert sorted(evaluations) == sorted({0, *range(0, len(losses), 4), len(losses)})
    assert evaluations[0] > 5
    assert latest["eval/loss"] == evaluations[len(losses)] < 3
    for name in ("grad_norm", "lr", "tokens_per_second", "token_entropy", "seconds/update"):
        assert f"train/{name}" in latest
    assert checkpoints(config.run_dir)[-1].name == f"step_{len(losses):08d}"


def test_updates_equal_a_loop_written_out_with_torch(config):
    instruction_tune(config)
    records = read_metrics(config.run_dir / "metrics.jsonl")
    model = load_model(config.model, "cpu")
    tokenizer = load_tokenizer(config.model)
    train = PackedSftDataset(tokenizer, config.train_data, 64, shuffle=True, seed=0)
    test = PackedSftDataset(tokenizer, config.eval_data, 64, shuffle=True, seed=0)

    def loss_of(dataset, indices):
        logits = model(stacked(dataset, indices, "input_ids")).logits
        return cross_entropy(logits.flatten(0, 1), stacked(dataset, indices, "labels").flatten())

    with torch.no_grad():
        assert records[0]["eval/loss"] == pytest.approx(loss_of(test, range(len(test))).item(), rel=1e-5)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    order = np.random.default_rng((0, 0)).permutation(len(train))
    steps = [record for record in records if "train_step" in record]
    assert len(steps) == -(-len(train) // 8) > 3
    for number, record in enumerate(steps):
        loss = loss_of(train, order[8 * number : 8 * number + 8].tolist())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = 1e-2 * 0.5 * (1 + np.cos(np.pi * number / len(steps)))
        optimizer.step()
        assert record["train/loss"] == pytest.approx(loss.item(), rel=1e-4)
    with torch.no_grad():
        assert records[-1]["eval/loss"] == pytest.approx(loss_of(test, range(len(test))).item(), rel=1e-4)


@pytest.mark.parametrize("split", [{"gradient_accumulation_steps": 8}, {"microbatch_tokens": 200}])
def test_the_split_into_microbatches_does_not_matter(config, tmp_path, split):
    optimizer = OptimizerConfig(lr=1e-3, gradient_accumulation_steps=1)
    instruction_tune(replace(config, optimizer=optimizer))
    instruction_tune(replace(config, run_dir=tmp_path / "split", optimizer=replace(optimizer, **split)))
    assert_same_weights(config.run_dir, tmp_path / "split", tolerance=1e-5)
    for whole, parts in zip(timeless(config.run_dir), timeless(tmp_path / "split"), strict=True):
        assert parts == pytest.approx(whole, rel=1e-4)


def test_a_stopped_run_resumes_bit_for_bit(config, tmp_path, monkeypatch):
    instruction_tune(replace(config, run_dir=tmp_path / "straight"))
    cut_power_at(5, monkeypatch)
    with pytest.raises(PowerCutError):
        instruction_tune(config)
    monkeypatch.undo()
    assert [path.name for path in checkpoints(config.run_dir)] == ["step_00000003"]
    instruction_tune(config)
    assert timeless(config.run_dir) == timeless(tmp_path / "straight")
    assert_same_weights(config.run_dir, tmp_path / "straight")


def test_part_of_the_evaluation(config):
    part = replace(config, eval_sequences=2, optimizer=replace(config.optimizer, lr=0.0))
    loss = instruction_tune(part)["eval/loss"]
    model = load_model(config.model, "cpu")
    test = PackedSftDataset(load_tokenizer(config.model), config.eval_data, 64, shuffle=True, seed=0)
    with torch.no_grad():
        logits = model(stacked(test, (0, 1), "input_ids")).logits.flatten(0, 1)
    expected = cross_entropy(logits, stacked(test, (0, 1), "labels").flatten())
    assert loss == pytest.approx(expected.item(), rel=1e-5)


def test_without_an_evaluation(config):
    assert not any(name.startswith("eval") for name in instruction_tune(replace(config, eval_data=None)))


def test_divergence_saves_the_batch(config):
    with pytest.raises(FloatingPointError, match=r"diverged at update 2: .*; the batch is in .*diverged_at_2\.json"):
        instruction_tune(replace(config, optimizer=replace(config.optimizer, lr=1e30)))
    batch = json.loads((config.run_dir / "diverged_at_2.json").read_text())
    assert len(batch) == 8
    assert {len((row["prompt"] + row["response"]).replace("<|endoftext|>", "$")) for row in batch} == {65}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seq_length": 0}, "seq_length is 0, but must be at least 1"),
        ({"eval_every": 0}, "eval_every is 0"),
        ({"epochs": 0}, "epochs is 0"),
        ({"eval_sequences": 0}, "eval_sequences is 0"),
        ({"batch_size": 7}, "batch_size 7 must be a multiple of gradient_accumulation_steps 2"),
    ],
)
def test_impossible_configurations_are_refused(config, change, message):
    with pytest.raises(ValueError, match=message):
        replace(config, **change)


def test_what_is_wrong_is_one_sentence(config, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no data file absent\.jsonl"):
        instruction_tune(replace(config, train_data=Path("absent.jsonl")))
    write_rows(tmp_path / "fields.jsonl", [{"instruction": "Why?"}])
    with pytest.raises(ValueError, match=r"fields\.jsonl, line 1: field 'response' is missing"):
        instruction_tune(replace(config, eval_data=tmp_path / "fields.jsonl"))
    with pytest.raises(ValueError, match=r"20 of 20 training rows have a problem of the evaluation .*--allow-overlap"):
        instruction_tune(replace(config, eval_data=config.train_data))
    assert not config.run_dir.exists()
    with pytest.raises(ValueError, match="seq_length is 257, but the model's context is 256; choose at most that"):
        instruction_tune(replace(config, seq_length=257))
    write_rows(tmp_path / "short.jsonl", [{"prompt": "?", "response": "!"}])
    with pytest.raises(ValueError, match=r"short\.jsonl has \d+ tokens, but one chunk with its labels needs 251"):
        instruction_tune(replace(config, train_data=tmp_path / "short.jsonl", seq_length=250, eval_data=None))
