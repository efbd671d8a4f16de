"""Grading many responses at once."""

import functools
import os
import signal
import time

import pytest

from cs336_alignment.rollouts import grader as grader_module
from cs336_alignment.rollouts.grader import Grader
from cs336_alignment.rollouts.rewards import question_only_reward_fn, r1_zero_reward_fn
from tests.grading.functions import length_reward

ANSWERS = ["5", "0.5", r"\frac{1}{2}", "x+1", "1+x", "x-1", "(1,2)", "(2,1)", r"\sqrt{12}", r"2\sqrt{3}", "", "}{"]


@pytest.mark.parametrize(
    ("reward_fn", "template"),
    [(question_only_reward_fn, r"so \boxed{{{}}}"), (r1_zero_reward_fn, "</think> <answer> {} </answer>")],
)
def test_a_grader_gives_what_the_function_gives(reward_fn, template):
    responses = [template.format(answer) for answer in ANSWERS for _ in ANSWERS] + ["no format", ""]
    truths = [truth for _ in ANSWERS for truth in ANSWERS] + ["5", "5"]
    with Grader(reward_fn, workers=2, timeout_s=60) as grader:
        rewards = grader.grade(responses, truths)
        assert rewards == [reward_fn(response, truth) for response, truth in zip(responses, truths)]
        assert 12 < sum(reward["reward"] for reward in rewards) < 30
        assert grader.grade([], []) == []


def test_equal_questions_are_asked_once(monkeypatch):
    with Grader("question_only", workers=1) as grader:
        asked = []
        through_pool = grader.pool.map
        monkeypatch.setattr(
            grader.pool, "map", lambda pairs, seconds: asked.extend(pairs) or through_pool(pairs, seconds)
        )
        monkeypatch.setattr(grader_module, "CACHE_SIZE", 3)
        responses, truths = [r"is \boxed{1+x}", r"is \boxed{\sin x}"], ["x+1", r"\cos x"]
        first = grader.grade(responses * 8, truths * 8)
        assert [reward["reward"] for reward in first] == [1.0, 0.0] * 8
        assert asked == [("1+x", "x+1"), (r"\sin x", r"\cos x")]
        assert grader.grade(responses * 8, truths * 8) == first
        assert grader.grade([r"\boxed{5}"], ["6"])[0]["reward"] == 0  # the fast path asks nobody
        assert len(asked) == 2
        grader.grade([rf"\boxed{{x+{i}}}" for i in range(4)], [f"{i}+x" for i in range(4)])
        grader.grade(responses, truths)  # forgotten meanwhile
        assert len(asked) == 2 + 4 + 2


def test_a_hostile_answer_costs_its_limit_once_and_harms_no_other():
    hostile = r"\boxed{9^{9^{9^{9}}} \pi}"
    with Grader("question_only", workers=2, timeout_s=1.0) as grader:
        grader.grade([r"\boxed{1+x}"], ["x+1"])
        started = time.monotonic()
        rewards = grader.grade([hostile, r"\boxed{x+2}"] * 8, ["x", "2+x"] * 8)
        assert [reward["reward"] for reward in rewards] == [0.0, 1.0] * 8
        assert [reward["format_reward"] for reward in rewards] == [1.0] * 16
        assert 1.0 <= time.monotonic() - started < 6.0  # 8 s if each of them cost its second
        for pid in grader.pool.idle_pids:
            os.kill(pid, signal.SIGKILL)
        assert grader.grade([r"\boxed{x+3}"], ["3+x"])[0]["reward"] == 1.0


def test_a_function_of_the_users_runs_in_the_workers():
    with Grader(length_reward, workers=2, timeout_s=1.0) as grader:
        rewards = grader.grade(["four", "hang", "seven77", "four"], ["4", "4", "4", "4"])
    assert [reward["reward"] for reward in rewards] == [1.0, 0.0, 0.0, 1.0]
    assert rewards[1] == {"reward": 0.0, "format_reward": 0.0, "answer_reward": 0.0}
    assert rewards[0] is not rewards[3]


def test_mistakes_are_one_sentence():
    with pytest.raises(ValueError, match="reward function 'r2' is unknown; choose one of r1_zero, question_only"):
        Grader("r2")
    with pytest.raises(ValueError, match="workers is 0 and timeout_s 1"):
        Grader("r1_zero", workers=0, timeout_s=1)
    with pytest.raises(ValueError, match="define it at the top level of a module"):
        Grader(lambda response, truth: {"reward": 1.0})
    with pytest.raises(ValueError, match="cannot import the reward function"):
        Grader(functools.partial(length_reward))
    with Grader("r1_zero") as grader, pytest.raises(ValueError, match="there are 1 responses, but 2 true answers"):
        grader.grade(["a"], ["a", "b"])
    with Grader(length_reward) as grader, pytest.raises(RuntimeError, match="invalid literal for int"):
        grader.grade(["a"], ["not a number"])
