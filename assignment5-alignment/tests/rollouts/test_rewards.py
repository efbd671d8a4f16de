"""The reward functions: of mathematics, and of benchmarks with a parser of their own."""

import time

import pytest

from cs336_alignment.grading.equality import answers_equal
from cs336_alignment.rollouts.rewards import MATH_REWARDS, REWARDS, question_only_reward_fn, r1_zero_reward_fn

RIGHT = {"reward": 1.0, "format_reward": 1.0, "answer_reward": 1.0}
WRONG = {"reward": 0.0, "format_reward": 1.0, "answer_reward": 0.0}
UNFORMATTED = {"reward": 0.0, "format_reward": 0.0, "answer_reward": 0.0}


@pytest.mark.parametrize(
    ("response", "rewards"),
    [
        (r"half </think> <answer> \frac{1}{2} </answer>", RIGHT),
        (r"half </think> <answer> 0.5 </answer>", RIGHT),
        (r"half </think> <answer> so \boxed{1/2}! </answer>", RIGHT),
        (r"half </think> <answer> 2 </answer>", WRONG),
        (r"half </think> <answer> \boxed{1/2 </answer>", WRONG),
        (r"half </think> <answer> </answer>", WRONG),
        (r"half </think><answer> 0.5 </answer>", UNFORMATTED),
        (r"half </think> <answer> 0.5", UNFORMATTED),
        (r"\boxed{0.5}", UNFORMATTED),
        ("", UNFORMATTED),
    ],
)
def test_r1_zero(response, rewards):
    assert r1_zero_reward_fn(response, r"\frac{1}{2}") == rewards


@pytest.mark.parametrize(
    ("response", "rewards"),
    [
        (r"It is $\boxed{\frac12}$.", RIGHT),
        (r"\boxed{2}, no, \boxed{0.5}", RIGHT),
        (r"\boxed{0.5}, no, \boxed{2}", WRONG),
        (r"\boxed{}", WRONG),
        (r"\boxed{0.5", UNFORMATTED),
        ("0.5", UNFORMATTED),
        (r"half </think> <answer> 0.5 </answer>", UNFORMATTED),
    ],
)
def test_question_only(response, rewards):
    assert question_only_reward_fn(response, r"\frac{1}{2}") == rewards


def test_rewards_are_floats_and_know_algebra():
    for name, response in (("r1_zero", "</think> <answer> {} </answer>"), ("question_only", r"\boxed{{{}}}")):
        for answer, rewards in (("(x+1)^2", RIGHT), ("(x-1)^2", WRONG)):
            given = MATH_REWARDS[name](response.format(answer), "x^2+2x+1")
            assert given == rewards
            assert all(type(value) is float for value in given.values())


HOSTILE = [
    "10^{10^{10}}",
    "9^{9^{9^{9}}}",
    "((((9!)!)!)!)!",
    r"\binom{10^9}{5 \cdot 10^8}",
    r"\sum_{k=1}^{10^{9}} k^k",
    r"\prod_{k=1}^{10^9} \sin k",
    r"x^{x^{x^{x^{x}}}}",
    r"\int_0^1 \int_0^1 x^{y^{x}} dx dy",
    "{" * 100_000,
    "(" * 900 + ")" * 900,
    r"\frac{" * 150,
    r"\sqrt" * 150,
    "+".join(f"x^{{{i}}}" for i in range(80)),
    "1'; DROP TABLE answers; --",
    "__import__('os').system('true')",
    "lambda: exec('raise SystemExit')",
    "\0\0\0",
    "\ud800",
    "٣٤",  # digits, but not ours
    "𝟙𝟚",
    "Ω≈ç√∫˜µ≤≥÷",
    "\u202e5\u202c",
]  # fmt: skip


@pytest.mark.parametrize("answer", HOSTILE)
def test_a_hostile_answer_is_wrong_within_its_time(answer):
    answers_equal("1+x", "x+1")  # the worker's start is not what is timed
    started = time.monotonic()
    assert not answers_equal(answer, r"\sqrt{7}", timeout_s=0.2)
    assert not answers_equal(r"\sqrt{7}", answer, timeout_s=0.2)
    assert time.monotonic() - started < 10  # a busy machine takes its time to end a process
    assert answers_equal("1+x", "x+1")


def test_answers_are_never_run_as_code(tmp_path):
    path = tmp_path / "touched"
    for answer in (f"open('{path}', 'w')", rf"\operatorname{{open('{path}', 'w')}}", f"x.__class__('{path}')"):
        assert not answers_equal(answer, "x")
    assert not path.exists()


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
def test_rewards_by_name(name, response, truth, format_reward, answer_reward):
    assert REWARDS[name](response, truth) == {
        "reward": answer_reward, "format_reward": format_reward, "answer_reward": answer_reward
    }  # fmt: skip
