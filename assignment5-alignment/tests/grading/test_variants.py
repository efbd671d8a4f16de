"""Rewritten answers, slightly wrong answers, and texts that are not answers, all made by rules."""

import random
import time
from collections import Counter

import pytest
from experiments.answer_variants import DIFFERENT, EQUAL, pairs_from
from experiments.answer_variants.noise import noise

from cs336_alignment.grading.quick import quick_equal
from cs336_alignment.rollouts.grader import Grader

TRUTHS = [
    "7", "-12", "4080", "1205000", "0.25", "-1.75", r"12,\!345", r"\frac{3}{8}", r"-\frac{7}{3}", r"\frac{11}{4}",
    r"\frac{2}{7}", r"40\%", r"12.5\%", r"\$18", r"\$2.75", r"30^\circ", r"15 \text{ cm}", r"9\text{ hours}",
    r"24 \text{ inches}^2", "(3, -2)", r"\left( \frac{1}{2}, 5 \right)", "(1, 0, -4)", "[2, 9)", r"(-\infty, 4]",
    r"(-\infty, -1) \cup (3, \infty)", "1, -3, 8", r"\sqrt{5}, -\sqrt{5}", r"5 \sqrt{2}", r"\frac{3\sqrt{5}}{7}",
    r"\sqrt{11}", r"12\pi", r"\frac{5 \pi}{6}", "3 - 4i", "x^2 - 5x + 6", r"2 + \sqrt{3}", "6a^3b - 2ab^2",
    r"\frac{x}{2} + 7", "y = 3x - 4", "2x + 5y = 11", "k = 6", r"\begin{pmatrix} 1 & -2 \\ 0 & 3/4 \end{pmatrix}",
    r"\begin{pmatrix} 5 \\ -1/2 \\ 2 \end{pmatrix}", r"\text{Monday}", r"\text{(B)}", r"\text{ellipse}", "243_5",
    r"1011_{2}",
]  # fmt: skip
PAIRS = [pair for truth in TRUTHS for pair in pairs_from(truth)]


def test_every_rule_is_tried():
    assert {pair.kind for pair in PAIRS} == EQUAL.keys() | DIFFERENT.keys()
    assert len(PAIRS) > 350
    assert pairs_from("7") == pairs_from("7")


@pytest.mark.parametrize("equal", [True, False])
def test_variants_are_told_apart(equal):
    pairs = [pair for pair in PAIRS if pair.equal is equal]
    with Grader("question_only", workers=2, timeout_s=60) as grader:
        rewards = grader.grade([rf"so \boxed{{{pair.answer}}}" for pair in pairs], [pair.truth for pair in pairs])
    assert [pair for pair, reward in zip(pairs, rewards) if (reward["reward"] == 1.0) is not equal] == []


def test_most_are_decided_without_sympy():
    decided = Counter(quick_equal(pair.answer, pair.truth) is not None for pair in PAIRS)
    assert decided[True] > 0.85 * len(PAIRS)


def test_noise_is_graded_without_an_exception_and_in_time():
    source = random.Random(0)
    responses = [rf"</think> <answer> {noise(source, TRUTHS)} </answer>" for _ in range(200)]
    truths = [source.choice(TRUTHS) for _ in responses]
    with Grader("r1_zero", workers=2, timeout_s=1.0) as grader:
        grader.grade(["</think> <answer> 1+x </answer>"], ["x+1"])
        started = time.monotonic()
        rewards = grader.grade(responses, truths)
        assert time.monotonic() - started < 60  # 100 s if most took their second
    assert all(reward["format_reward"] == 1.0 for reward in rewards)
    assert sum(reward["reward"] for reward in rewards) < 20
