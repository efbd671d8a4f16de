"""Rollouts as numbers and as text."""

import pytest

from cs336_alignment.datasets.example import Example
from cs336_alignment.policy.policy import Policy
from cs336_alignment.rollouts.engines.base import Completion
from cs336_alignment.rollouts.rollout import Rollout, log_generations, summarize
from tests.tiny import tiny_model, tiny_tokenizer


def rollout(text, tokens, reward, format_reward=1.0, finish_reason="stop"):
    rewards = {"reward": reward, "format_reward": format_reward, "answer_reward": reward}
    completion = Completion(text, tuple(range(5, 5 + tokens)), (-1.0,) * tokens, finish_reason)
    return Rollout(Example("2+2", "4", id="test/1"), "2+2=", completion, rewards)


def test_means():
    some = [rollout("4", 2, 1.0), rollout("5", 4, 0.0), rollout("?", 9, 0.0, 0.0, "length")]
    assert summarize(some) == pytest.approx({
        "reward": 1 / 3, "format_reward": 2 / 3, "answer_reward": 1 / 3, "unfinished": 1 / 3,
        "response_length": 5.0, "response_length_correct": 2.0, "response_length_incorrect": 6.5,
    })  # fmt: skip
    assert "response_length_correct" not in summarize(some[1:])
    ungraded = [Rollout(each.example, each.prompt, each.completion, {}) for each in some]
    assert summarize(ungraded) == pytest.approx({"response_length": 5.0, "unfinished": 1 / 3})


def test_plain_data():
    assert rollout("4 </answer>", 2, 1.0).as_json() == {
        "id": "test/1", "prompt": "2+2=", "response": "4 </answer>", "ground_truth": "4", "reward": 1.0,
        "format_reward": 1.0, "answer_reward": 1.0, "response_length": 2, "finish_reason": "stop",
    }  # fmt: skip


def test_text_to_read(tmp_path):
    policy = Policy(tiny_model(), tiny_tokenizer())
    some = [rollout("4 </answer>", 2, 1.0), rollout("It is", 4, 0.0, 0.0, "length"), rollout("", 0, 0.0, 0.0)]
    log_generations(tmp_path / "new" / "step_3.txt", some, {"reward": 1 / 3}, policy)
    head, *parts = (tmp_path / "new" / "step_3.txt").read_text().split("=" * 100 + "\n")
    assert head == "reward: 0.3333\n\n"
    entropy = policy.mean_entropy(some[0].tokenize(policy))
    assert parts[0] == (
        f"2+2=\n{'-' * 40} response\n4 </answer>\n{'-' * 40}\ntruth: 4\nreward: 1\nformat_reward: 1\nanswer_reward: 1\n"
        f"tokens: 2\nmean token entropy: {entropy:.4f}\n\n"
    )
    assert "tokens: 4 (cut short)\n" in parts[1]
    assert parts[2].endswith("tokens: 0\nmean token entropy: none: the response is empty\n")
