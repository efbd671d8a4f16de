"""Reward functions of benchmarks."""

import pytest

from cs336_alignment.rollouts.rewards import REWARDS


@pytest.mark.parametrize(
    ("name", "response", "truth", "format_reward", "answer_reward"),
    [
        ("mmlu", "The correct answer is B.", "B", 1, 1),
        ("mmlu", "The correct answer is B.", "C", 1, 0),
        ("mmlu", "I do not know.", "C", 0, 0),
        ("gsm8k", "So she has 1,200 dollars.", "1200", 1, 1),
        ("gsm8k", "It costs 5.00 dollars", "5", 1, 1),
        ("gsm8k", "It costs 6", "5", 1, 0),
        ("gsm8k", "It costs 6", "six", 1, 0),
        ("gsm8k", "nothing", "5", 0, 0),
        ("r1_zero", "1+1 </think> <answer> 2 </answer>", "2", 1, 1),
        ("question_only", r"\boxed{2}", "3", 1, 0),
    ],
)
def test_rewards(name, response, truth, format_reward, answer_reward):
    assert REWARDS[name](response, truth) == {
        "reward": answer_reward, "format_reward": format_reward, "answer_reward": answer_reward
    }  # fmt: skip
