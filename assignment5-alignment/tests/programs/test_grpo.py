"""GRPO: rewards rise, updates equal a reference written out with torch, and odd batches do not break a run."""

import json
import math
from dataclasses import replace

import pytest
import torch

from cs336_alignment.policy import policy
from cs336_alignment.policy.config import OptimizerConfig
from cs336_alignment.policy.loading import load_model, load_tokenizer
from cs336_alignment.programs import grpo
from cs336_alignment.programs.configs.grpo import GrpoConfig
from cs336_alignment.programs.grpo import train_grpo
from cs336_alignment.rollouts.config import EngineConfig
from cs336_alignment.rollouts.engines.base import Completion
from cs336_alignment.rollouts.rewards import REWARDS
from cs336_alignment.run_folder import read_metrics
from cs336_alignment.runs.checkpoint import checkpoints
from cs336_alignment.runs.data_order import shuffled_indices
from cs336_alignment.tensors.recipes import RECIPES
from tests import scripted_engine
from tests.programs.test_sft import PowerCutError, assert_same_weights, cut_power_at, final_weights, timeless
from tests.tiny_task import TinyTask


def share_of_a(response, ground_truth):
    """Reward the fraction of the letter a in a response, which a random model learns at once."""
    share = response.count("a") / max(1, len(response))
    return {"reward": share, "format_reward": float("a" in response), "answer_reward": share}


@pytest.fixture(autouse=True)
def reward(monkeypatch):
    monkeypatch.setitem(REWARDS, "share_of_a", share_of_a)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return TinyTask.make(tmp_path_factory.mktemp("task"))


@pytest.fixture
def config(task, tmp_path):
    return GrpoConfig(**(task.common | {
        "run_dir": tmp_path / "run", "train_data": task.folder / "train.jsonl", "n_grpo_steps": 3,
        "rollout_batch_size": 16, "group_size": 4, "train_batch_size": 16,
        "optimizer": OptimizerConfig(lr=3e-3, gradient_accumulation_steps=4), "checkpoint_every": 2,
        "rollouts": task.rollouts(reward="share_of_a", stop=()), "evaluation": task.evaluation(eval_every=2),
    }))  # fmt: skip


@pytest.fixture
def say(task, monkeypatch):
    """Let the engine respond with a function of the prompt and of the number of the sample."""

    def use(respond):
        engine = scripted_engine.ScriptedEngine(load_tokenizer(task.folder / "model"), respond)
        return scripted_engine.use(engine, monkeypatch)

    return use


def train_records(run):
    return [record for record in read_metrics(run / "metrics.jsonl") if "train_step" in record]


def eval_records(run):
    return [record for record in read_metrics(run / "metrics.jsonl") if "eval_step" in record]


def test_the_defaults_are_the_courses():
    config = GrpoConfig()
    expected = {
        "n_grpo_steps": 200, "advantage_eps": 1e-6, "rollout_batch_size": 256, "group_size": 8, "min_tokens": 4,
        "epochs_per_rollout_batch": 1, "train_batch_size": 256, "loss_type": "reinforce_with_baseline",
        "use_std_normalization": True, "cliprange": 0.2,
    }  # fmt: skip
    assert {name: getattr(config, name) for name in expected} == expected
    optimizer = config.optimizer
    assert (optimizer.lr, optimizer.gradient_accumulation_steps, optimizer.max_grad_norm) == (1e-5, 128, 1.0)
    assert (optimizer.algorithm, optimizer.weight_decay, optimizer.betas) == ("adamw", 0.0, (0.9, 0.95))
    assert (config.rollouts.temperature, config.rollouts.max_tokens) == (1.0, 1024)
    assert config.rollouts.engine == EngineConfig("vllm", gpu_memory_utilization=0.85)
    assert config.evaluation.eval_examples == 1024
    assert not config.off_policy


def test_the_reward_rises(config, task):
    config = replace(
        config, n_grpo_steps=14, rollout_batch_size=32, train_batch_size=32, group_size=8,
        optimizer=OptimizerConfig(lr=2e-2, gradient_accumulation_steps=2),
        evaluation=task.evaluation(eval_every=14, eval_examples=None),
    )  # fmt: skip
    latest = train_grpo(config)
    before, after = (record["eval/reward"] for record in eval_records(config.run_dir))
    assert before < 0.1
    assert after > 0.5
    records = train_records(config.run_dir)
    assert [record["train_step"] for record in records] == list(range(1, 15))
    for name in (
        *("loss", "grad_norm", "lr", "token_entropy", "reward", "format_reward", "answer_reward", "reward_std"),
        *("frac_reward_zero_std", "response_length", "unfinished", "log_prob_gap", "log_prob_gap_max", "skipped"),
        *("seconds/weight_sync", "seconds/rollout", "seconds/grading", "seconds/update"),
        *("rollout_tokens_per_second", "tokens_per_second", "grpo_step"),
    ):
        assert math.isfinite(latest[f"train/{name}"]), name
    assert latest["train/log_prob_gap"] <= latest["train/log_prob_gap_max"] < 1e-4
    assert records[-1]["train/token_entropy"] < records[0]["train/token_entropy"]
    assert "mean token entropy" in (config.run_dir / "generations" / "step_00000014.txt").read_text()


def test_an_update_is_the_one_written_out_with_torch(config, say, task):
    """REINFORCE with a baseline, over responses of different lengths."""
    say(lambda prompt, sample: ("ab" * sample + "c" * 5)[: 5 + sample])
    train_grpo(replace(config, n_grpo_steps=1, evaluation=task.evaluation(eval_data=None)))
    model = load_model(task.folder / "model", "cpu").double()
    rows = [json.loads(line) for line in (task.folder / "train.jsonl").open()]
    encode = load_tokenizer(task.folder / "model")
    losses = []
    for index in shuffled_indices(len(rows), seed=0, start=0, count=4):
        texts = [("ab" * sample + "c" * 5)[: 5 + sample] for sample in range(4)]
        rewards = torch.tensor([share_of_a(text, "")["reward"] for text in texts], dtype=torch.float64)
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
        for text, advantage in zip(texts, advantages):
            prompt, response = (encode(part)["input_ids"] for part in (rows[index]["question"] + "=", text))
            ids = torch.tensor(prompt + response)
            log_probs = model(ids[None]).logits[0].log_softmax(-1)[:-1].gather(-1, ids[1:, None])[:, 0]
            losses.append(-advantage * log_probs[len(prompt) - 1 :].mean())
    loss = torch.stack(losses).mean()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    (record,) = train_records(config.run_dir)
    assert record["train/loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert record["train/grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
    torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0).step()
    gradients = {name: weight.grad.abs() for name, weight in model.named_parameters()}
    for name, weight in final_weights(config.run_dir).items():
        if name in gradients:  # the first step of AdamW is the gradient's sign, which is noise near zero
            clear = gradients[name] > 1e-6
            expected = model.state_dict()[name]
            torch.testing.assert_close(weight.double()[clear], expected[clear], atol=1e-5, rtol=0)


@pytest.mark.parametrize("loss_type", RECIPES)
@pytest.mark.parametrize("split", [{"gradient_accumulation_steps": 8}, {"microbatch_tokens": 60}])
def test_the_split_into_microbatches_does_not_matter(config, task, say, tmp_path, loss_type, split):
    say(lambda prompt, sample: ("a" * (sample % 3) + "bcd" * (int(prompt[0]) + sample))[:12])
    config = replace(
        config, n_grpo_steps=1, epochs_per_rollout_batch=2, loss_type=loss_type, kl_coefficient=0.1,
        evaluation=task.evaluation(eval_data=None),
    )  # fmt: skip
    train_grpo(replace(config, optimizer=OptimizerConfig(lr=1e-3, eps=1e-3, gradient_accumulation_steps=1)))
    train_grpo(replace(config, optimizer=OptimizerConfig(lr=1e-3, eps=1e-3, **split), run_dir=tmp_path / "split"))
    assert_same_weights(config.run_dir, tmp_path / "split", tolerance=1e-6)
    for whole, parts in zip(timeless(config.run_dir), timeless(tmp_path / "split"), strict=True):
        assert parts == pytest.approx(whole, rel=1e-3, abs=1e-6)


def test_on_policy_clipping_is_reinforce_with_a_baseline(config, task, tmp_path):
    config = replace(config, n_grpo_steps=2, evaluation=task.evaluation(eval_data=None))
    train_grpo(config)
    clipped = train_grpo(replace(config, loss_type="grpo_clip", run_dir=tmp_path / "clip"))
    assert_same_weights(config.run_dir, tmp_path / "clip", tolerance=1e-5)
    assert clipped["train/clip_fraction"] == 0


def test_off_policy_updates_use_log_probs_from_before_the_first_update(config, task, monkeypatch):
    seen = []
    frozen, loss = policy.Policy.log_probs_no_grad, grpo.policy_gradient_loss

    def count(self, rows, *rest):
        seen.append(("old", frozen(self, rows, *rest)))
        return seen[-1][1]

    def look(log_probs, mask, loss_type, rewards, advantages, old, *rest, **options):
        seen.append(("update", (log_probs.detach()[mask], old[mask])))
        return loss(log_probs, mask, loss_type, rewards, advantages, old, *rest, **options)

    monkeypatch.setattr(policy.Policy, "log_probs_no_grad", count)
    monkeypatch.setattr(grpo, "policy_gradient_loss", look)
    config = replace(
        config, n_grpo_steps=1, epochs_per_rollout_batch=2, train_batch_size=8, loss_type="grpo_clip",
        optimizer=OptimizerConfig(lr=3e-2, gradient_accumulation_steps=1), evaluation=task.evaluation(eval_data=None),
    )  # fmt: skip
    assert config.off_policy
    train_grpo(config)
    assert [what for what, _ in seen] == ["old", *["update"] * 4]
    for number, (_, (now, old)) in enumerate(seen[1:]):
        assert torch.allclose(now, old, atol=1e-4) == (number == 0)
    for epoch in (seen[1:3], seen[3:5]):  # each response once an epoch
        used = torch.cat([old for _, (_, old) in epoch]).sort().values
        torch.testing.assert_close(used, torch.cat(seen[0][1]).sort().values)
    records = train_records(config.run_dir)
    assert [record["train_step"] for record in records] == [1, 2, 3, 4]
    assert records[-1]["train/clip_fraction"] > 0
    assert ["train/seconds/old_log_probs" in record for record in records] == [True, False, False, False]
    assert all("train/seconds/update" in record for record in records)


def test_sampling_temperature_is_that_of_the_loss(config, task):
    config = replace(config, rollouts=replace(config.rollouts, temperature=0.5), loss_type="grpo_clip",
                     n_grpo_steps=1, evaluation=task.evaluation(eval_data=None))  # fmt: skip
    latest = train_grpo(config)
    assert "train/log_prob_gap" not in latest  # the engine's log-probabilities are before temperature
    assert latest["train/token_entropy"] < 5


def test_a_stopped_run_resumes_bit_for_bit(config, tmp_path, monkeypatch):
    config = replace(config, n_grpo_steps=5, loss_type="grpo_clip", train_batch_size=8, kl_coefficient=0.01)
    train_grpo(replace(config, run_dir=tmp_path / "straight"))
    cut_power_at(8, monkeypatch)
    with pytest.raises(PowerCutError):
        train_grpo(config)
    monkeypatch.undo()
    monkeypatch.setitem(REWARDS, "share_of_a", share_of_a)
    assert checkpoints(config.run_dir)[-1].name == "step_00000002"
    assert train_records(config.run_dir)[-1]["train_step"] == 7
    train_grpo(config)
    assert timeless(config.run_dir) == timeless(tmp_path / "straight")
    assert_same_weights(config.run_dir, tmp_path / "straight")
    for text in (config.run_dir / "generations").iterdir():
        assert text.read_text() == (tmp_path / "straight" / "generations" / text.name).read_text()


@pytest.mark.parametrize("response", ["bcd", "aaa", ""])
@pytest.mark.parametrize("loss_type", ["grpo_clip", "dapo"])
def test_a_batch_of_one_reward_updates_nothing(config, task, say, response, loss_type):
    engine = say(lambda *_: response)
    config = replace(config, loss_type=loss_type, evaluation=task.evaluation(eval_data=None), max_rollout_rounds=3)
    train_grpo(config)
    for record in train_records(config.run_dir):
        assert record["train/skipped"] == record["train/frac_reward_zero_std"] == 1
        assert "train/loss" not in record
        assert not any(map(math.isnan, record.values()))
    initial = load_model(task.folder / "model", "cpu").state_dict()
    assert all(torch.equal(initial[name], weight) for name, weight in final_weights(config.run_dir).items())
    rounds = sum(isinstance(call, tuple) for call in engine.calls)
    assert rounds == 3 * (3 if loss_type == "dapo" else 1)


def test_momentum_moves_nothing_when_a_batch_teaches_nothing(config, task, say, monkeypatch):
    step = [0]
    engine = say(lambda prompt, sample: "ab" if step[0] == 1 and sample else "b")
    generate = engine.generate
    monkeypatch.setattr(engine, "generate", lambda *args: step.__setitem__(0, step[0] + 1) or generate(*args))
    config = replace(config, n_grpo_steps=2, checkpoint_every=1, evaluation=task.evaluation(eval_data=None))
    train_grpo(config)
    assert [record["train/skipped"] for record in train_records(config.run_dir)] == [0, 1]
    first, second = (load_model(path, "cpu").state_dict() for path in checkpoints(config.run_dir))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_without_a_baseline_equal_rewards_teach(config, task, say):
    say(lambda *_: "aab")
    train_grpo(replace(config, n_grpo_steps=1, loss_type="no_baseline", evaluation=task.evaluation(eval_data=None)))
    (record,) = train_records(config.run_dir)
    assert record["train/skipped"] == 0
    assert record["train/grad_norm"] > 0


def test_dapo_draws_other_questions_for_groups_of_one_reward(config, task, say):
    """Questions that begin with 1 have groups of one reward."""
    engine = say(lambda prompt, sample: "ab" if prompt.startswith("1") or sample else "b")
    config = replace(
        config, loss_type="dapo", n_grpo_steps=1, max_rollout_rounds=10, seed=1,
        evaluation=task.evaluation(eval_data=None),
    )  # fmt: skip
    train_grpo(config)
    rounds = [call[0] for call in engine.calls if isinstance(call, tuple)]
    asked = [prompt for prompts in rounds for prompt in prompts]
    equal = sum(prompt.startswith("1") for prompt in asked)
    assert len(rounds) > 1
    assert len(set(asked)) == len(asked) == equal + 4
    (record,) = train_records(config.run_dir)
    assert record["train/frac_reward_zero_std"] == equal / len(asked)  # of all that was sampled, as is the reward
    assert record["train/reward"] == pytest.approx((0.5 * equal + 0.375 * 4) / len(asked))
    assert record["train/skipped"] == 0


def test_empty_responses_do_no_harm(config, task, say):
    say(lambda prompt, sample: "ab" * sample)
    train_grpo(replace(config, loss_type="grpo_clip", evaluation=task.evaluation(eval_data=None)))
    for record in train_records(config.run_dir):
        assert record["train/skipped"] == 0
        assert math.isfinite(record["train/loss"])


def test_the_reference_holds_the_policy_back(config, task, say, tmp_path):
    say(lambda prompt, sample: "ab" * sample + "c")
    drifts = []
    for coefficient in (0.0, 10.0):
        run = tmp_path / str(coefficient)
        train_grpo(replace(config, run_dir=run, kl_coefficient=coefficient, evaluation=task.evaluation(eval_data=None),
                           n_grpo_steps=4))  # fmt: skip
        initial = load_model(task.folder / "model", "cpu").state_dict()
        drifts.append(sum((final_weights(run)[name] - initial[name]).abs().sum().item() for name in initial))
        records = train_records(run)
        if coefficient:
            assert records[0]["train/kl"] == pytest.approx(0, abs=1e-6)
            assert all(record["train/kl"] >= 0 for record in records)
            assert records[-1]["train/kl"] > 0
        else:
            assert "train/kl" not in records[0]
    assert drifts[1] < drifts[0]


def test_tokens_are_the_engines_not_those_of_its_text(config, task, say, monkeypatch):
    """An engine may sample one token where the tokenizer would produce several."""
    engine = say(None)
    engine.generate = lambda prompts, params: [
        [
            Completion("</answer>" + "a" * sample, (7, 7, 8, 9 + sample), (-1.0,) * 4, "stop")
            for sample in range(params.n)
        ]
        for _ in prompts
    ]
    rows = []
    original = policy.Policy.response_log_probs
    monkeypatch.setattr(
        policy.Policy,
        "response_log_probs",
        lambda self, some, *a, **k: rows.extend(some) or original(self, some, *a, **k),
    )
    train_grpo(replace(config, n_grpo_steps=1, evaluation=task.evaluation(eval_data=None)))
    assert {row.response for row in rows} == {(7, 7, 8, 9 + sample) for sample in range(4)}


def test_a_loss_of_nan_saves_its_batch(config, task, say):
    say(lambda prompt, sample: "ab" * sample + "c")
    optimizer = OptimizerConfig(lr=1e30, gradient_accumulation_steps=4)
    with pytest.raises(
        FloatingPointError, match=r"diverged at update 2: .*; the batch is in .*diverged_at_2\.json; low"
    ):
        train_grpo(replace(config, optimizer=optimizer, evaluation=task.evaluation(eval_data=None)))
    batch = json.loads((config.run_dir / "diverged_at_2.json").read_text())
    assert len(batch) == 16
    assert {"prompt", "response", "reward", "advantage", "token_ids"} <= batch[0].keys()
    (record,) = train_records(config.run_dir)
    assert math.isfinite(record["train/loss"])


def test_broken_weights_are_noticed_by_what_they_generate(config, task):
    optimizer = OptimizerConfig(lr=1e30, gradient_accumulation_steps=4)
    with pytest.raises(FloatingPointError, match=r"probabilities are NaN|diverged"):
        train_grpo(replace(config, optimizer=optimizer, evaluation=task.evaluation(eval_data=None)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rollout_batch_size": 15}, "rollout_batch_size 15 must be a multiple of group_size 4"),
        ({"train_batch_size": 2, "optimizer": OptimizerConfig(gradient_accumulation_steps=2)},
         "train_batch_size 2 must be at least group_size 4"),
        ({"optimizer": OptimizerConfig(gradient_accumulation_steps=3)},
         "train_batch_size 16 must be a multiple of gradient_accumulation_steps 3"),
        ({"train_batch_size": 12}, "rollout_batch_size 16 must be a multiple of train_batch_size 12"),
        ({"group_size": 1}, "group_size is 1, but loss_type 'reinforce_with_baseline' compares the responses of a gr"),
        ({"n_grpo_steps": 0}, "n_grpo_steps is 0"),
        ({"epochs_per_rollout_batch": 0}, "epochs_per_rollout_batch is 0"),
        ({"max_rollout_rounds": 0}, "max_rollout_rounds is 0"),
        ({"cliprange": -0.1}, "cliprange is -0.1, but must not be negative"),
        ({"kl_coefficient": -0.1}, "kl_coefficient is -0.1"),
        ({"min_tokens": 13}, "min_tokens is 13"),
    ],
)  # fmt: skip
def test_impossible_configurations_are_refused(config, change, message):
    with pytest.raises(ValueError, match=message):
        replace(config, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reward": None}, "GRPO needs a reward function"),
        ({"temperature": 0.0}, "temperature is 0, but then all responses of a group are the same"),
    ],
)
def test_impossible_rollouts_are_refused(config, change, message):
    with pytest.raises(ValueError, match=message):
        replace(config, rollouts=replace(config.rollouts, **change))


def test_names_stand_for_recipes_that_options_overrule(config):
    assert config.recipe == RECIPES["reinforce_with_baseline"]
    assert not replace(config, loss_type="dr_grpo").recipe.normalize_by_std
    assert not replace(config, use_std_normalization=False).recipe.normalize_by_std
    assert replace(config, length_normalization="masked_normalize").recipe.aggregation == "masked_normalize"
    assert replace(config, loss_type="dapo").recipe.cliprange_high == 0.28
    assert replace(config, loss_type="dapo", cliprange_high=0.3).recipe.cliprange_high == 0.3
    replace(config, group_size=1, loss_type="no_baseline")


def test_problems_of_the_evaluation_are_not_trained_on(config):
    with pytest.raises(ValueError, match="16 of 16 training rows have a problem of the evaluation"):
        train_grpo(replace(config, train_data=config.evaluation.eval_data))
    assert not config.run_dir.exists()


def test_a_step_with_vllm(config, task):
    """Rollouts, an update, and an evaluation with the new weights."""
    pytest.importorskip("vllm")
    rollouts = replace(config.rollouts, engine=EngineConfig("vllm"))
    latest = train_grpo(replace(config, n_grpo_steps=5, rollouts=rollouts, evaluation=task.evaluation(eval_every=1)))
    updates = [record for record in train_records(config.run_dir) if not record["train/skipped"]]
    assert len(updates) >= 2  # in a step or two, all rewards may be equal
    for record in updates:  # all but the first are with weights that came from the trainer
        assert record["train/log_prob_gap_max"] < 1e-3
    assert latest["train/rollout_tokens_per_second"] > 0
    assert len(eval_records(config.run_dir)) == 6
