"""Problems of the evaluation are found among training rows: bare, set differently, and in templates."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cs336_alignment.datasets.demonstrations import Demonstration
from cs336_alignment.datasets.example import Example
from cs336_alignment.datasets.overlap import check_no_overlap, find_overlap
from cs336_alignment.datasets.preferences import PreferencePair
from cs336_alignment.prompts.templates import load_prompt

PROBLEM = "Find $x$ if:\n\\[x + 1 = 2.\\]Give the answer: a number."


def examples(*prompts):
    return [Example(prompt, "1") for prompt in prompts]


@pytest.mark.parametrize(
    "other",
    [
        PROBLEM,
        PROBLEM.upper(),
        f"\n  {PROBLEM}\n",
        "Find $x$ if:\n\n\\[x+1=2.\\]  Give the  answer: a number.",
        "Ｆｉｎｄ $x$\u00a0if:\r\n\\[x + 1 = 2.\\]Give the answer: a number.",
        *(load_prompt(name).render(PROBLEM) for name in ("r1_zero", "question_only", "alpaca_sft", "zero_shot_system")),
        f"Question: {PROBLEM}",
        f"# Query:\n```{PROBLEM}```\n",
    ],
)
def test_the_same_problem_in_other_words_of_a_printer(other):
    assert find_overlap(examples("What?", other), examples(PROBLEM)) == [1]
    assert find_overlap([Demonstration(other, "r")], examples("Why?", PROBLEM)) == [0]
    assert find_overlap([PreferencePair(other, "a", "b")], examples(PROBLEM)) == [0]


@pytest.mark.parametrize(
    "other",
    [
        PROBLEM.replace("2", "3"),
        PROBLEM.replace("+", "-"),
        PROBLEM.replace("x + 1", "x + 11"),
        PROBLEM.splitlines()[0],
        PROBLEM.splitlines()[1],
        "a number.",
        PROBLEM + " Explain.",
        "\n".join(reversed(PROBLEM.splitlines())),
    ],
)
def test_another_problem(other):
    assert find_overlap(examples(other), examples(PROBLEM)) == []


def test_digits_are_not_run_together():
    assert find_overlap(examples("1 2 + 3"), examples("12 + 3")) == []
    assert find_overlap(examples("12+3"), examples("12 + 3")) == [0]
    assert find_overlap(examples("User: 12+3+4\nAssistant:", "112+3", "12+34"), examples("12+3")) == []


@given(st.lists(st.text("ab \n:`", max_size=8), max_size=6), st.lists(st.text("ab \n:`", max_size=8), max_size=6))
def test_equal_texts_are_always_found(train, evaluation):
    found = find_overlap(examples(*train), examples(*evaluation))
    blank = {text for text in train if not text.strip("` \t\n")}
    assert {index for index, text in enumerate(train) if text in evaluation and text not in blank} <= set(found)


def test_thousands_of_problems_take_no_time():
    draws = random.Random(0)
    texts = ["\n".join(f"line {draws.random()}: and {draws.random()}" for _ in range(10)) for _ in range(4000)]
    assert find_overlap(examples(*texts[:3000]), examples(*texts[2990:])) == list(range(2990, 3000))


def test_training_on_shared_problems_is_refused():
    train, evaluation = examples("a?", "B?", "c?", "d?"), examples("b?", "d?")
    with pytest.raises(ValueError, match=r"2 of 4 training rows have .*, such as 'B\?'; .* with --allow-overlap"):
        check_no_overlap(train, evaluation, allow=False)
    assert check_no_overlap(train, evaluation, allow=True) == 2
    assert check_no_overlap(train, examples("e?"), allow=False) == 0
    assert check_no_overlap([], [], allow=False) == 0


def test_a_long_problem_is_shown_from_its_end():
    long = "word " * 100 + "end?"
    with pytest.raises(ValueError, match=r"such as '\.\.\.[word ]{190,200} end\?'; use"):
        check_no_overlap(examples(long), examples(long), allow=False)
