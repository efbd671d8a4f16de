"""Supervised fine-tuning: it learns, resumes bit for bit, and reports mistakes."""

import json
import math
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cs336_alignment.policy.config import OptimizerConfig
from cs336_alignment.policy.loading import load_model, load_tokenizer
from cs336_alignment.policy.optimizer import PolicyOptimizer
from cs336_alignment.programs import sft
from cs336_alignment.programs.configs.sft import SftConfig, SftUpdateConfig
from cs336_alignment.programs.sft import train_sft
from cs336_alignment.rollouts.config import EvaluationConfig
from cs336_alignment.run_folder import read_metrics
from cs336_alignment.runs.checkpoint import checkpoints
from cs336_alignment.runs.run_log import RunLog
from cs336_alignment.tensors.tokenization import tokenize_prompt_and_output
from tests import scripted_engine
from tests.tiny_task import TinyTask, write_rows


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return TinyTask.make(tmp_path_factory.mktemp("task"))


@pytest.fixture
def config(task, tmp_path):
    return SftConfig(**(task.common | {
        "run_dir": tmp_path / "run", "train_data": task.folder / "sft.jsonl",
        "imitation": SftUpdateConfig(batch_size=8),
        "optimizer": OptimizerConfig(lr=1e-2, gradient_accumulation_steps=2), "checkpoint_every": 3,
        "rollouts": task.rollouts(), "evaluation": task.evaluation(eval_every=2, log_examples=2),
    }))  # fmt: skip


def timeless(run):
    """Read the metrics without times, which are all that may depend on interruptions."""
    clock = ("seconds", "tokens_per_second")
    return [
        {name: value for name, value in record.items() if not any(word in name for word in clock)}
        for record in read_metrics(run / "metrics.jsonl")
    ]


def final_weights(run):
    return load_model(checkpoints(run)[-1], "cpu").state_dict()


def assert_same_weights(run, other, tolerance=0.0):
    for (name, ours), theirs in zip(final_weights(run).items(), final_weights(other).values(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0, msg=name)


def test_it_learns(config):
    evaluation = replace(config.evaluation, eval_every=10)
    latest = train_sft(replace(config, imitation=SftUpdateConfig(batch_size=8, epochs=6), evaluation=evaluation))
    records = read_metrics(config.run_dir / "metrics.jsonl")
    losses = [record["train/token_loss"] for record in records if "train_step" in record]
    assert len(losses) == 30
    assert losses[0] > 5  # log 262 is 5.57
    assert losses[-1] < 1.5
    assert [record["eval_step"] for record in records if "eval_step" in record] == [0, 10, 20, 30]
    for name in ("loss", "grad_norm", "lr", "token_loss", "token_entropy", "seconds/update", "tokens_per_second"):
        assert f"train/{name}" in latest
    for name in ("reward", "format_reward", "answer_reward", "response_length", "unfinished", "seconds/evaluation"):
        assert f"eval/{name}" in latest
    assert latest["eval/format_reward"] > 0.4
    texts = sorted((config.run_dir / "generations").iterdir())
    assert len(texts) == 4
    assert texts[-1].read_text().count("mean token entropy: ") == 2
    stored = json.loads((config.run_dir / "config.json").read_text())
    assert stored["config"]["imitation"] == {"epochs": 6, "batch_size": 8, "normalize_constant": 1.0}
    assert [path.name for path in checkpoints(config.run_dir)] == ["step_00000027", "step_00000030"]


def test_first_updates_equal_a_loop_written_out_with_torch(config, task, monkeypatch):
    seen = []
    original = sft.sft_update
    monkeypatch.setattr(sft, "sft_update", lambda run, batch, *rest: seen.append(batch) or original(run, batch, *rest))
    constant = replace(config, imitation=SftUpdateConfig(batch_size=8, normalize_constant=10.0))
    train_sft(replace(constant, evaluation=task.evaluation(eval_data=None)))
    model = load_model(task.folder / "model", "cpu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    records = read_metrics(config.run_dir / "metrics.jsonl")
    for batch, record in zip(seen, records, strict=True):
        losses = []
        for row in batch:
            ids = torch.tensor([*row.prompt, *row.response])
            log_probs = model(ids[None]).logits[0].log_softmax(-1)[:-1].gather(-1, ids[1:, None])[:, 0]
            losses.append(-log_probs[len(row.prompt) - 1 :].sum() / 10)
        loss = torch.stack(losses).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        assert record["train/loss"] == pytest.approx(loss.item(), rel=1e-4)
        assert record["train/grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
    rows = [row for batch in seen for row in batch]
    assert len({row.prompt for row in rows}) == 40  # each once
    decode = load_tokenizer(task.folder / "model").decode
    first = decode(list(rows[0].prompt)), decode(list(rows[0].response))
    assert {"prompt": first[0], "response": first[1]}.items() <= json.loads(
        next(line for line in config.train_data.open() if json.dumps(first[0]) in line)
    ).items()
    tensors = tokenize_prompt_and_output([first[0]], [first[1]], load_tokenizer(task.folder / "model"))
    assert tensors["response_mask"].sum() == len(rows[0].response)


@pytest.mark.parametrize("split", [{"gradient_accumulation_steps": 8}, {"microbatch_tokens": 70}])
def test_the_split_into_microbatches_does_not_matter(config, task, tmp_path, split):
    config = replace(config, evaluation=task.evaluation(eval_data=None), train_examples=8)
    train_sft(replace(config, optimizer=OptimizerConfig(lr=1e-3, gradient_accumulation_steps=1)))
    train_sft(replace(config, optimizer=OptimizerConfig(lr=1e-3, **split), run_dir=tmp_path / "split"))
    assert_same_weights(config.run_dir, tmp_path / "split", tolerance=1e-6)
    whole, parts = (timeless(run)[-1] for run in (config.run_dir, tmp_path / "split"))
    assert parts == pytest.approx(whole, rel=1e-4)


class PowerCutError(Exception):
    pass


def cut_power_at(step, monkeypatch):
    original = RunLog.write

    def write(self, kind, number, metrics):
        if (kind, number) == ("train", step):
            raise PowerCutError
        original(self, kind, number, metrics)

    monkeypatch.setattr(RunLog, "write", write)


@pytest.mark.parametrize(("step", "kept"), [(5, ["step_00000003"]), (2, [])])
def test_a_stopped_run_resumes_bit_for_bit(config, tmp_path, monkeypatch, step, kept):
    train_sft(replace(config, run_dir=tmp_path / "straight"))
    cut_power_at(step, monkeypatch)
    with pytest.raises(PowerCutError):
        train_sft(config)
    monkeypatch.undo()
    assert [path.name for path in checkpoints(config.run_dir)] == kept
    with open(config.run_dir / "metrics.jsonl", "a") as file:
        file.write('{"train_step": 5, "train/lo')  # what a killed process may leave
    train_sft(config)
    assert timeless(config.run_dir) == timeless(tmp_path / "straight")
    assert_same_weights(config.run_dir, tmp_path / "straight")
    for text in (config.run_dir / "generations").iterdir():
        assert text.read_text() == (tmp_path / "straight" / "generations" / text.name).read_text()


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_keeps_a_checkpoint(config, tmp_path, monkeypatch, capsys):
    train_sft(replace(config, run_dir=tmp_path / "straight"))
    original = PolicyOptimizer.accumulate
    updates = []

    def accumulate(self, *args):
        updates.append(1)
        if len(updates) == 2:  # in the middle of a step
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, *args)

    monkeypatch.setattr(PolicyOptimizer, "accumulate", accumulate)
    with pytest.raises(KeyboardInterrupt):
        train_sft(config)
    assert checkpoints(config.run_dir)[-1].name == "step_00000002"
    assert "Ctrl-C again stops at once" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    monkeypatch.undo()
    train_sft(config)
    assert timeless(config.run_dir) == timeless(tmp_path / "straight")
    assert_same_weights(config.run_dir, tmp_path / "straight")


def test_a_complete_run_is_left_alone(config, capsys):
    train_sft(config)
    metrics, checkpoint = config.run_dir / "metrics.jsonl", checkpoints(config.run_dir)[-1]
    before = metrics.read_bytes(), checkpoint.stat().st_mtime_ns
    latest = train_sft(config)
    assert (metrics.read_bytes(), checkpoint.stat().st_mtime_ns) == before
    assert latest["train_step"] == 5
    assert "is complete" in capsys.readouterr().err


def test_another_configuration_does_not_resume(config):
    config = replace(config, train_examples=8)
    train_sft(config)
    changed = replace(config, seed=1, optimizer=replace(config.optimizer, lr=0.5))
    with pytest.raises(ValueError, match=r"configuration \(optimizer\.lr was 0\.01, now 0\.5; seed was 0, now 1\)"):
        train_sft(changed)
    smaller = replace(config.optimizer, microbatch_tokens=50)  # what helps when memory was too small
    train_sft(replace(config, keep_checkpoints=1, checkpoint_every=7, optimizer=smaller))
    (config.run_dir / "config.json").write_text('{"config": 3}')
    with pytest.raises(ValueError, match=r"config\.json is damaged; restore it, or delete .*run to start again"):
        train_sft(config)


def test_bfloat16_trains_like_float32(config, task, tmp_path):
    config = replace(config, evaluation=task.evaluation(eval_data=None))
    exact = train_sft(config)
    half = train_sft(replace(config, precision="bfloat16", run_dir=tmp_path / "half"))
    assert half["train/loss"] == pytest.approx(exact["train/loss"], rel=0.05)
    assert half["train/loss"] != exact["train/loss"]
    assert {weight.dtype for weight in final_weights(tmp_path / "half").values()} == {torch.float32}


def test_gradient_checkpointing_changes_nothing(config, task, tmp_path):
    config = replace(config, evaluation=task.evaluation(eval_data=None), train_examples=8)
    train_sft(config)
    train_sft(replace(config, gradient_checkpointing=True, run_dir=tmp_path / "other"))
    assert_same_weights(config.run_dir, tmp_path / "other", tolerance=1e-6)


def test_divergence_saves_the_batch(config, task):
    optimizer = OptimizerConfig(lr=1e30, gradient_accumulation_steps=2)
    with pytest.raises(FloatingPointError, match=r"diverged at update 2: the loss is .*; the batch is in .*at_2\.json"):
        train_sft(replace(config, optimizer=optimizer, evaluation=task.evaluation(eval_data=None)))
    batch = json.loads((config.run_dir / "diverged_at_2.json").read_text())
    assert len(batch) == 8
    assert batch[0]["response"].startswith(" </think> <answer>")
    assert all(math.isfinite(record["train/loss"]) for record in read_metrics(config.run_dir / "metrics.jsonl"))
    assert not checkpoints(config.run_dir)


def test_only_correct_responses(config, task, capsys):
    filtered = replace(config, only_correct=True, evaluation=task.evaluation(eval_data=None), train_examples=16)
    train_sft(filtered)
    assert read_metrics(config.run_dir / "metrics.jsonl")[-1]["train_step"] == 2
    with pytest.raises(ValueError, match=r"train_examples is 21, but .*sft\.jsonl has 20"):
        train_sft(replace(filtered, train_examples=21))
    write_rows(task.folder / "no_answers.jsonl", [{"prompt": "1+1=", "response": "2"}])
    with pytest.raises(ValueError, match=r"row 1 of .*no_answers\.jsonl has no field ground_truth"):
        train_sft(replace(filtered, train_data=task.folder / "no_answers.jsonl"))
    write_rows(task.folder / "wrong.jsonl", [{"prompt": "1+1=", "response": "3", "ground_truth": "2"}])
    with pytest.raises(ValueError, match=r"wrong\.jsonl has no response that receives the full reward 'r1_zero'"):
        train_sft(replace(filtered, train_data=task.folder / "wrong.jsonl"))


def test_smaller_data_sets_are_part_of_larger_ones(config, task, monkeypatch):
    seen = []
    original = sft.tokenize_demonstrations
    monkeypatch.setattr(sft, "tokenize_demonstrations", lambda *args: seen.append(original(*args)) or seen[-1])
    config = replace(config, evaluation=task.evaluation(eval_data=None))
    for size in (4, 8):
        train_sft(replace(config, train_examples=size, run_dir=config.run_dir / str(size)))
    assert seen[1][:4] == seen[0]


def test_what_does_not_fit_into_the_context_is_left_out(config, task, capsys):
    rows = [{"prompt": "1+1=", "response": "2" * length} for length in (1, 124, 125)]
    write_rows(task.folder / "long.jsonl", rows)
    config = replace(config, train_data=task.folder / "long.jsonl", evaluation=task.evaluation(eval_data=None))
    train_sft(config)
    assert "1 of 3 examples are longer than the model's context of 128 tokens" in capsys.readouterr().err
    write_rows(task.folder / "long.jsonl", rows[2:])
    with pytest.raises(ValueError, match=r"no example of .*long\.jsonl fits into the model's context of 128 tokens"):
        train_sft(replace(config, run_dir=config.run_dir / "other"))


def test_problems_of_the_evaluation_are_not_trained_on(config, task):
    write_rows(task.folder / "leak.jsonl", [{"prompt": "User: 100+1", "response": "101"}] * 2)
    config = replace(config, train_data=task.folder / "leak.jsonl")
    with pytest.raises(ValueError, match=r"2 of 2 training rows have a problem of the evaluation .*--allow-overlap"):
        train_sft(config)
    assert not config.run_dir.exists()
    train_sft(replace(config, allow_overlap=True))


def test_the_engine_evaluates_the_weights_of_the_moment(config, task, monkeypatch):
    tokenizer = load_tokenizer(task.folder / "model")
    engine = scripted_engine.ScriptedEngine(tokenizer, lambda *_: " </think> <answer>101</answer>")
    scripted_engine.use(engine, monkeypatch)
    train_sft(config)
    assert len(engine.weights) == 4  # before the first update, and after 2, 4 and 5
    initial = load_model(task.folder / "model", "cpu").state_dict()
    final = final_weights(config.run_dir)
    for name in final:
        assert torch.equal(engine.weights[0][name], initial[name])
        assert torch.equal(engine.weights[-1][name], final[name])
    awake = [call if isinstance(call, str) else "generate" for call in engine.calls]
    assert awake == ["sleep", *["wake", "generate", "sleep"] * 4]
    prompts, params = engine.calls[2]
    assert len(prompts) == 8
    assert (params.temperature, params.n, params.stop, params.max_tokens) == (1.0, 1, ("</answer>",), 12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": -1}, "seed is -1"),
        ({"checkpoint_every": 0}, "checkpoint_every is 0, but must be at least 1"),
        ({"keep_checkpoints": 0}, "keep_checkpoints is 0"),
        ({"train_examples": 0}, "train_examples is 0"),
        ({"imitation": SftUpdateConfig(batch_size=5)}, "batch_size 5 must be a multiple of gradient_accumulation_ste"),
    ],
)
def test_impossible_configurations_are_refused(config, change, message):
    with pytest.raises(ValueError, match=message):
        replace(config, **change)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SftUpdateConfig(epochs=0), "epochs is 0"),
        (lambda: EvaluationConfig(eval_every=0), "eval_every is 0"),
        (lambda: EvaluationConfig(log_examples=-1), "log_examples -1 must not be negative"),
        (lambda: SftUpdateConfig(normalize_constant=0.0), "normalize_constant is 0.0, but must be positive"),
        (lambda: SftConfig(only_correct=True, rollouts=replace(SftConfig().rollouts, reward=None)), "reward is None"),
    ],
)
def test_impossible_parts_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"train_data": Path("absent.jsonl")}, FileNotFoundError, "there is no data file absent.jsonl"),
        ({"model": "absent/model"}, FileNotFoundError, "absent/model is neither a folder nor a model"),
        ({"device": "cuda:99"}, ValueError, "device 'cuda:99' cannot be used here"),
        ({"wandb_project": "p"}, ValueError, "--wandb-project is 'p', but wandb is not installed"),
    ],
)
def test_what_is_missing_is_one_sentence(config, change, error, message, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(error, match=message) as caught:
        train_sft(replace(config, **change))
    assert "\n" not in str(caught.value)


def test_a_row_with_missing_fields_is_named(config, task):
    write_rows(task.folder / "broken.jsonl", [{"prompt": "1+1=", "response": "2"}, {"prompt": "1+2="}])
    with pytest.raises(ValueError, match=r"broken\.jsonl, line 2: field 'response' is missing"):
        train_sft(replace(config, train_data=task.folder / "broken.jsonl"))
