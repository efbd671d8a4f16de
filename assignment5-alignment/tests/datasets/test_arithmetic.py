"""Generated sums are right, distinct and reproducible, and the splits do not overlap."""

import re
from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cs336_alignment.datasets.arithmetic import make_problems, r1_response, split_of
from cs336_alignment.datasets.example import Example
from cs336_alignment.grading.extract import extract_answer

splits = st.sampled_from(["train", "held_out"])


@given(seed=st.integers(0, 2**32), steps=st.integers(3, 8), split=splits)
@settings(max_examples=50, deadline=None)
def test_answers_and_every_step_are_right(seed, steps, split):
    for problem in make_problems(5, seed, steps=steps, split=split):
        assert re.fullmatch(r"\d([-+][123])+", problem.prompt)
        numbers = [int(number) for number in re.findall(r"[-+]?\d", problem.prompt)]
        results = list(accumulate(numbers))[1:]
        assert len(results) == steps
        assert all(0 <= result <= 9 for result in results)
        assert problem.solution == " ".join(map(str, results))
        assert int(problem.answer) == results[-1] == sum(numbers)


def test_responses_by_hand():
    problem = Example("5+1-2", "4", solution="6 4")
    assert r1_response(problem) == " 6 4 </think> <answer> 4 </answer>"
    assert r1_response(problem, worked=False) == " </think> <answer> 4 </answer>"


@given(seed=st.integers(0, 99), other_seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_no_seeds_mix_training_and_held_out_problems(seed, other_seed):
    train = make_problems(50, seed, split="train")
    held_out = make_problems(50, other_seed, split="held_out")
    assert not {problem.prompt for problem in train} & {problem.prompt for problem in held_out}
    assert {split_of(problem.prompt) for problem in train} == {"train"}
    assert {split_of(problem.prompt) for problem in held_out} == {"held_out"}


def test_an_eighth_is_held_out():
    held_out = sum(split_of(f"question {number}") == "held_out" for number in range(8000))
    assert 900 < held_out < 1100


def test_seeds_fix_the_problems():
    assert make_problems(50, 3) == make_problems(50, 3)
    assert make_problems(50, 3)[:20] == make_problems(20, 3)
    assert make_problems(50, 3) != make_problems(50, 4)


def test_the_answer_can_be_extracted_from_a_response():
    for worked in (True, False):
        for problem in make_problems(20, 0):
            assert extract_answer(r1_response(problem, worked)) == problem.answer


def test_problems_run_out():
    with pytest.raises(ValueError, match="cannot find 100 different problems of 1 steps"):
        make_problems(100, 0, steps=1)
    with pytest.raises(ValueError, match="at least 1"):
        make_problems(1, 0, steps=0)
