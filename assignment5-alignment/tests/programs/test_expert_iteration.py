"""Expert iteration: only correct responses are imitated."""

from dataclasses import replace

import pytest
import torch

from cs336_alignment.datasets.demonstrations import load_demonstrations
from cs336_alignment.policy.config import OptimizerConfig
from cs336_alignment.policy.loading import load_model, load_tokenizer
from cs336_alignment.programs import expert_iteration
from cs336_alignment.programs.configs.expert_iteration import ExpertIterationConfig
from cs336_alignment.programs.configs.sft import SftUpdateConfig
from cs336_alignment.programs.expert_iteration import run_expert_iteration
from cs336_alignment.rollouts.rewards import REWARDS
from cs336_alignment.run_folder import read_metrics
from cs336_alignment.runs.checkpoint import checkpoints
from tests import scripted_engine
from tests.programs.test_sft import PowerCutError, assert_same_weights, cut_power_at, timeless
from tests.tiny_task import TRAIN, TinyTask


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return TinyTask.make(tmp_path_factory.mktemp("task"))


@pytest.fixture
def config(task, tmp_path):
    return ExpertIterationConfig(**(task.common | {
        "run_dir": tmp_path / "run", "train_data": task.folder / "train.jsonl", "n_ei_steps": 2,
        "question_batch_size": 16, "rollouts_per_question": 3, "imitation": SftUpdateConfig(batch_size=8, epochs=2),
        "optimizer": OptimizerConfig(lr=1e-2, gradient_accumulation_steps=2),
        "rollouts": task.rollouts(), "evaluation": task.evaluation(),
    }))  # fmt: skip


def right_for_even_numbers(prompt, sample):
    number = int(prompt.split("+")[0])
    return f" </think> <answer>{number + 1 if number % 2 == 0 and sample == 1 else 0}</answer>"


@pytest.fixture
def engine(task, monkeypatch):
    tokenizer = load_tokenizer(task.folder / "model")
    return scripted_engine.use(scripted_engine.ScriptedEngine(tokenizer, right_for_even_numbers), monkeypatch)


def test_defaults():
    config = ExpertIterationConfig()
    assert (config.n_ei_steps, config.question_batch_size, config.min_tokens) == (5, 512, 4)
    assert config.optimizer.max_grad_norm == 1.0


def test_only_correct_responses_are_imitated(config, engine, monkeypatch):
    imitated = []
    original = expert_iteration.sft_update
    monkeypatch.setattr(
        expert_iteration, "sft_update", lambda run, batch, *rest: imitated.append(batch) or original(run, batch, *rest)
    )
    run_expert_iteration(config)
    asked = [call for call in engine.calls if isinstance(call, tuple) and call[1].n == 3]
    assert [call[1].min_tokens for call in asked] == [4, 4]
    prompts = [prompt for call in asked for prompt in call[0]]
    assert len(set(prompts)) == 32  # no question comes twice before all had their turn
    for step, (prompts, _) in enumerate(asked, start=1):
        even = [prompt for prompt in prompts if int(prompt.split("+")[0]) % 2 == 0]
        kept = load_demonstrations(config.run_dir / "correct" / f"step_{step:08d}.jsonl")
        assert [example.prompt for example in kept] == even
        assert all(example.response == f" </think> <answer>{example.answer}</answer>" for example in kept)
        updates = -(-2 * len(kept) // 8)  # two epochs, in batches of 8
        trained = [each.as_json(engine.tokenizer) for batch in imitated[:updates] for each in batch]
        del imitated[:updates]
        expected = 2 * [{"prompt": each.prompt, "response": each.response} for each in kept]
        assert sorted(trained, key=str) == sorted(expected, key=str)
    assert not imitated

    records = [record for record in read_metrics(config.run_dir / "metrics.jsonl") if "train_step" in record]
    assert [record["train_step"] for record in records] == list(range(1, len(records) + 1))
    for record in records:
        assert record["train/reward"] == pytest.approx(record["train/correct_responses"] / 48)
        assert record["train/token_entropy"] > 0
    for name in ("rollout", "grading", "update"):
        assert f"train/seconds/{name}" in records[0]
    assert [path.name for path in checkpoints(config.run_dir)] == ["step_00000001", "step_00000002"]
    assert records[-1]["train/token_loss"] < records[0]["train/token_loss"]


def test_a_step_without_a_correct_response_changes_nothing(config, engine, task):
    engine.respond = lambda *_: "what?"
    run_expert_iteration(config)
    records = [record for record in read_metrics(config.run_dir / "metrics.jsonl") if "train_step" in record]
    assert [(record["train/skipped"], record["train/correct_responses"]) for record in records] == [(1, 0)] * 2
    initial = load_model(task.folder / "model", "cpu").state_dict()
    for name, weight in load_model(checkpoints(config.run_dir)[-1], "cpu").state_dict().items():
        assert torch.equal(initial[name], weight)


def starts_with_a_vowel(response, ground_truth):
    return dict.fromkeys(("reward", "format_reward", "answer_reward"), float(response[:1] in tuple("aeiouAEIOU")))


def test_a_stopped_run_resumes_bit_for_bit(config, tmp_path, monkeypatch):
    """The transformers engine continues its random numbers too."""
    monkeypatch.setitem(REWARDS, "vowel", starts_with_a_vowel)
    config = replace(config, rollouts=replace(config.rollouts, reward="vowel"), rollouts_per_question=8)
    run_expert_iteration(replace(config, run_dir=tmp_path / "straight"))
    records = timeless(tmp_path / "straight")
    first_of_second_step = next(each["train_step"] for each in records if each.get("train/ei_step") == 2)
    cut_power_at(first_of_second_step, monkeypatch)
    with pytest.raises(PowerCutError):
        run_expert_iteration(config)
    monkeypatch.undo()
    monkeypatch.setitem(REWARDS, "vowel", starts_with_a_vowel)
    run_expert_iteration(config)
    assert timeless(config.run_dir) == records
    assert_same_weights(config.run_dir, tmp_path / "straight")


def test_more_questions_than_there_are_come_again(config, engine):
    run_expert_iteration(replace(config, n_ei_steps=1, question_batch_size=60))
    prompts = next(call for call in engine.calls if isinstance(call, tuple) and call[1].n == 3)[0]
    assert len(prompts) == 60
    assert len(set(prompts)) == len(TRAIN)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_ei_steps": 0}, "n_ei_steps is 0"),
        ({"question_batch_size": 0}, "question_batch_size is 0"),
        ({"rollouts_per_question": 0}, "rollouts_per_question is 0"),
        ({"min_tokens": 13}, "min_tokens is 13, but must lie between 0 and max_tokens 12"),
        ({"imitation": SftUpdateConfig(batch_size=5)}, "batch_size 5 must be a multiple of"),
    ],
)
def test_impossible_configurations_are_refused(config, change, message):
    with pytest.raises(ValueError, match=message):
        replace(config, **change)


def test_problems_of_the_evaluation_are_not_trained_on(config):
    with pytest.raises(ValueError, match="16 of 16 training rows have a problem of the evaluation"):
        run_expert_iteration(replace(config, train_data=config.evaluation.eval_data))
