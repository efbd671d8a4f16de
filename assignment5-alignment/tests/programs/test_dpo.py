"""Training on preferences: it learns them, equals a loop written out with torch, resumes, and reports mistakes."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cs336_alignment.datasets.preferences import PreferencePair, load_preferences
from cs336_alignment.policy.config import OptimizerConfig
from cs336_alignment.policy.loading import load_model, load_tokenizer
from cs336_alignment.policy.tiny_model import make_tiny_model
from cs336_alignment.programs import dpo
from cs336_alignment.programs.configs.dpo import DpoConfig
from cs336_alignment.programs.dpo import tokenize_pair, train_dpo
from cs336_alignment.run_folder import read_metrics
from cs336_alignment.runs.checkpoint import checkpoints
from cs336_alignment.runs.data_order import Epochs
from cs336_alignment.tensors.dpo_loss import compute_per_instance_dpo_loss, encode_document, sequence_log_probs
from tests.programs.test_sft import PowerCutError, assert_same_weights, cut_power_at, timeless
from tests.tiny import tiny_tokenizer
from tests.tiny_task import write_rows

PLACES = ["here", "there", "home", "away"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, and pairs whose chosen response is the friendly one."""
    folder = tmp_path_factory.mktemp("dpo")
    make_tiny_model(folder / "model", hidden_size=32, layers=1, context_length=256, initializer_range=0.1)
    rows = [
        {"prompt": f"Are {number} {place}?", "chosen": f"Yes, {number}.", "rejected": f"No, go {place}."}
        for number in range(8)
        for place in PLACES
    ]
    for part, name in enumerate(("one", "two")):
        write_rows(folder / f"{name}.jsonl", rows[part::2])
    return folder


@pytest.fixture
def config(folder, tmp_path):
    return DpoConfig(
        run_dir=tmp_path / "run", model=str(folder / "model"), device="cpu", precision="float32",
        train_data=(folder / "one.jsonl", folder / "two.jsonl"), held_out_pairs=8, batch_size=8, eval_every=2,
        checkpoint_every=2, optimizer=OptimizerConfig(lr=1e-3, algorithm="rmsprop", gradient_accumulation_steps=2),
    )  # fmt: skip


def records_of(run, kind):
    return [record for record in read_metrics(run / "metrics.jsonl") if f"{kind}_step" in record]


def test_the_defaults_are_the_courses():
    config = DpoConfig()
    assert (config.batch_size, config.beta, config.held_out_pairs, config.epochs) == (64, 0.1, 200, 1)
    assert (config.optimizer.algorithm, config.optimizer.lr) == ("rmsprop", 1e-6)
    assert [path.parent.name for path in config.train_data] == [
        "helpful-base", "harmless-base", "helpful-online", "helpful-rejection-sampled"
    ]  # fmt: skip


def test_it_learns_what_is_preferred_of_pairs_that_it_has_not_seen(config, capsys):
    latest = train_dpo(replace(config, epochs=4))
    evaluations = records_of(config.run_dir, "eval")
    assert [record["eval_step"] for record in evaluations] == [0, 2, 4, 6, 8, 10, 12]
    at_start = {"loss": math.log(2), "accuracy": 0, "margin": 0, "chosen_reward": 0, "rejected_reward": 0}
    for name, value in at_start.items():
        assert evaluations[0][f"eval/{name}"] == pytest.approx(value, abs=1e-6)
    assert latest["eval/accuracy"] == 1
    assert latest["eval/loss"] < 0.3
    assert latest["eval/margin"] == pytest.approx(latest["eval/chosen_reward"] - latest["eval/rejected_reward"])
    assert latest["train/accuracy"] == 1
    for name in ("loss", "margin", "chosen_reward", "rejected_reward", "grad_norm", "lr", "tokens_per_second"):
        assert f"train/{name}" in latest
    assert "24 pairs to train on, 8 held out\n" in capsys.readouterr().err
    assert [path.name for path in checkpoints(config.run_dir)] == ["step_00000010", "step_00000012"]


def test_updates_equal_a_loop_written_out_with_torch(config, monkeypatch):
    """The reference loss uses whole documents; the log-probabilities of the prompts cancel."""
    seen, batches = [], Epochs.batch
    monkeypatch.setattr(Epochs, "batch", lambda *args: seen.append(batches(*args)) or seen[-1])
    pairs, tokenize = [], dpo.tokenize_pair
    monkeypatch.setattr(dpo, "tokenize_pair", lambda tokenizer, pair: pairs.append(pair) or tokenize(tokenizer, pair))
    train_dpo(config)
    assert sorted(index for batch in seen for index in batch) == list(range(24))  # each once

    policy, reference = (load_model(config.model, "cpu") for _ in range(2))
    tokenizer = load_tokenizer(config.model)
    optimizer = torch.optim.RMSprop(policy.parameters(), lr=1e-3)
    for batch, record in zip(seen, records_of(config.run_dir, "train"), strict=True):
        of_batch = [pairs[index] for index in batch]
        rewards = {
            name: [reward(policy, reference, tokenizer, pair.prompt, getattr(pair, name)) for pair in of_batch]
            for name in ("chosen", "rejected")
        }
        losses = [
            compute_per_instance_dpo_loss(policy, reference, tokenizer, 0.1, pair.prompt, pair.chosen, pair.rejected)
            for pair in of_batch
        ]
        loss = torch.stack(losses).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        assert record["train/loss"] == pytest.approx(loss.item(), abs=1e-5)
        assert record["train/grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
        for name, values in rewards.items():
            assert record[f"train/{name}_reward"] == pytest.approx(sum(values) / 8, abs=1e-4)
    assert_close(policy, config.run_dir)


def reward(policy, reference, tokenizer, prompt, response):
    """β times the log-ratio of the response alone, counted from the end of the document."""
    tokens = torch.tensor(encode_document(tokenizer, prompt, response))
    count = len(tokenizer(response)["input_ids"]) + 1
    with torch.no_grad():
        log_probs = [
            model(tokens[None]).logits[0, :-1].log_softmax(-1).gather(-1, tokens[1:, None])[-count:].sum()
            for model in (policy, reference)
        ]
    return 0.1 * (log_probs[0] - log_probs[1]).item()


def assert_close(model, run):
    trained = load_model(checkpoints(run)[-1], "cpu").state_dict()
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(trained[name], weight, atol=1e-4, rtol=0, msg=name)


@pytest.mark.parametrize("split", [{"gradient_accumulation_steps": 8}, {"microbatch_tokens": 1000}])
def test_the_split_into_microbatches_does_not_matter(config, tmp_path, split):
    # with a large eps, RMSprop does not blow up what rounding does to gradients near zero
    optimizer = OptimizerConfig(lr=1e-2, eps=1.0, algorithm="rmsprop", gradient_accumulation_steps=1)
    train_dpo(replace(config, optimizer=optimizer))
    train_dpo(replace(config, run_dir=tmp_path / "split", optimizer=replace(optimizer, **split)))
    assert_same_weights(config.run_dir, tmp_path / "split", tolerance=1e-6)
    for whole, parts in zip(timeless(config.run_dir), timeless(tmp_path / "split"), strict=True):
        whole.pop("train/accuracy", None)  # at the start, rounding decides it
        assert {name: parts[name] for name in whole} == pytest.approx(whole, rel=1e-3, abs=1e-5)


def test_a_stopped_run_resumes_bit_for_bit(config, tmp_path, monkeypatch):
    train_dpo(replace(config, run_dir=tmp_path / "straight"))
    cut_power_at(3, monkeypatch)
    with pytest.raises(PowerCutError):
        train_dpo(config)
    monkeypatch.undo()
    assert [path.name for path in checkpoints(config.run_dir)] == ["step_00000002"]
    train_dpo(config)
    assert timeless(config.run_dir) == timeless(tmp_path / "straight")
    assert_same_weights(config.run_dir, tmp_path / "straight")


def test_other_pairs_do_not_resume(config, folder, tmp_path):
    data = tmp_path / "pairs.jsonl"
    lines = (folder / "one.jsonl").read_text().splitlines(keepends=True)
    data.write_text("".join(lines))
    config = replace(config, train_data=(data,), held_out_pairs=4)
    train_dpo(config)
    data.write_text("".join(lines[:-1]))
    with pytest.raises(ValueError, match="run began with 12 pairs instead of these 11; restore the files"):
        train_dpo(config)


def test_a_held_out_prompt_is_not_trained_on(config, tmp_path, capsys):
    rows = [
        {"prompt": f"Are {number} there?", "chosen": f"Yes{mark}", "rejected": "No"}
        for number in range(8)
        for mark in ".!"
    ]
    write_rows(tmp_path / "twice.jsonl", rows)
    config = replace(config, train_data=(tmp_path / "twice.jsonl",), held_out_pairs=3)
    held_out = {pair.prompt for pair in dpo.hold_out(load_preferences(config.train_data[0])[0], config)[1]}
    train_dpo(config)
    message = f"{16 - 2 * len(held_out)} pairs to train on, 3 held out; left out: "
    shared = 2 * len(held_out) - 3
    assert f"{message}{shared} for the prompt of a held-out pair" in capsys.readouterr().err
    assert shared > 0
    train_dpo(replace(config, allow_overlap=True, run_dir=config.run_dir / "other"))
    assert "13 pairs to train on, 3 held out\n" in capsys.readouterr().err


def test_pairs_that_are_too_long_are_left_out(config, folder, capsys):
    prompt = {"prompt": "?"}
    length = len(encode_document(load_tokenizer(config.model), "?", ""))
    room = 256 - length
    write_rows(folder / "long.jsonl", [
        prompt | {"chosen": "a" * room, "rejected": "b"}, prompt | {"chosen": "a", "rejected": "b" * (room + 1)}
    ])  # fmt: skip
    config = replace(config, train_data=(folder / "long.jsonl",), held_out_pairs=0)
    latest = train_dpo(config)
    assert "1 pairs to train on, 0 held out; left out: 1 for more than 256 tokens" in capsys.readouterr().err
    assert "eval/loss" not in latest
    config = replace(config, run_dir=config.run_dir / "other", max_tokens=length)
    with pytest.raises(ValueError, match=r"no pair is left to train on \(left out: 2 for more than \d+ tokens\)"):
        train_dpo(config)


def test_divergence_saves_the_batch(config):
    with pytest.raises(FloatingPointError, match=r"diverged at update 2: the loss is .*; the batch is in .*at_2\.json"):
        train_dpo(replace(config, optimizer=replace(config.optimizer, lr=1e30)))
    batch = json.loads((config.run_dir / "diverged_at_2.json").read_text())
    assert len(batch) == 8
    assert batch[0]["prompt"].endswith("### Response:\n")
    assert batch[0]["chosen"].startswith("Yes")
    assert batch[0]["rejected"].endswith(".<|endoftext|>")


class TestTokens:
    def test_a_response_is_what_comes_after_the_prompt(self):
        tokenizer = tiny_tokenizer()
        pair = tokenize_pair(tokenizer, PreferencePair("Why?", "The answer is 7", "The answer"))
        assert pair.chosen.prompt == pair.rejected.prompt
        assert tokenizer.decode(pair.chosen.prompt).endswith("### Instruction:\nWhy?\n\n### Response:\n")
        assert tokenizer.decode(pair.chosen.response) == "The answer is 7<eos>"
        assert tokenizer.decode(pair.rejected.response) == "The answer<eos>"
        assert len(pair) == 2 * len(pair.chosen)

    def test_a_token_across_the_boundary_belongs_to_the_response(self):
        tokenizer = tiny_tokenizer()
        tokenizer.add_tokens(["\nBe"])  # takes the line break before the response
        pair = tokenize_pair(tokenizer, PreferencePair("Why?", "Because", "No"))
        assert pair.chosen.prompt == pair.rejected.prompt
        assert tokenizer.decode(pair.chosen.prompt).endswith("### Response:")
        assert tokenizer.decode(pair.chosen.response) == "\nBecause<eos>"
        assert tokenizer.decode(pair.rejected.response) == "\nNo<eos>"

    def test_log_probs_are_those_of_documents_less_those_of_prompts(self, folder):
        policy = dpo.Policy(load_model(folder / "model", "cpu"), load_tokenizer(folder / "model"))
        pairs = [PreferencePair("Why?", "Because.", "No"), PreferencePair("And why then?", "B", "Hm, hm.")]
        tokens = [tokenize_pair(policy.tokenizer, pair) for pair in pairs]
        chosen, rejected = dpo.pair_log_probs(policy, tokens)
        prompts = sequence_log_probs(policy.model, [pair.chosen.prompt for pair in tokens])
        for name, result in (("chosen", chosen), ("rejected", rejected)):
            documents = [encode_document(policy.tokenizer, pair.prompt, getattr(pair, name)) for pair in pairs]
            expected = sequence_log_probs(policy.model, documents) - prompts
            torch.testing.assert_close(result, expected, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta": 0.0}, "beta is 0.0, but must be positive"),
        ({"held_out_pairs": -1}, "held_out_pairs is -1, but must not be negative"),
        ({"train_data": ()}, "train_data is empty; name at least one file"),
        ({"eval_every": 0}, "eval_every is 0, but must be at least 1"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"batch_size": 7}, "batch_size 7 must be a multiple of gradient_accumulation_steps 2"),
    ],
)
def test_impossible_configurations_are_refused(config, change, message):
    with pytest.raises(ValueError, match=message):
        replace(config, **change)


def test_what_is_wrong_with_the_data_is_one_sentence(config, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no data file absent\.jsonl"):
        train_dpo(replace(config, train_data=(Path("absent.jsonl"),)))
    write_rows(tmp_path / "fields.jsonl", [{"prompt": "Why?", "chosen": "Because."}])
    with pytest.raises(ValueError, match=r"fields\.jsonl, line 1: field 'rejected' is missing"):
        train_dpo(replace(config, train_data=(tmp_path / "fields.jsonl",)))
    with pytest.raises(ValueError, match="held_out_pairs is 32, but there are 32 pairs in all; hold out fewer"):
        train_dpo(replace(config, held_out_pairs=32))
    assert not config.run_dir.exists()
