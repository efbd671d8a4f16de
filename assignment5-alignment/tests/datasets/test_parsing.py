"""Letters and numbers that responses state."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cs336_alignment.datasets.parsing import parse_gsm8k_response, parse_mmlu_response

QUESTION = {
    "subject": "virology",
    "question": "How many human polyomaviruses are known at present?",
    "options": ["100", "1", "10", "unknown"],
    "answer": "A",
}


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("The correct answer is B. There is only one human polyomavirus known, the BK virus.", "B"),
        ("The correct answer is 10000 polyomaviruses.", None),
        ("B", "B"),
        (" B.\n", "B"),
        ("C) 10", "C"),
        ("D: unknown", "D"),
        ("**B**", "B"),
        ("B\n\nQuestion: Another one?\nAnswer: C", "B"),
        ("(C)", "C"),
        ("I would say (C), since ten are known.", "C"),
        ("[D]", "D"),
        (r"So it is $\boxed{A}$.", "A"),
        ("Answer: D", "D"),
        ("ANSWER: (D)", "D"),
        ("The answer is: D", "D"),
        ('The correct answer is "A".', "A"),
        ("The correct answer is **C. 10**", "C"),
        ("The correct answer is option C", "C"),
        ("the answer is A because a hundred are known", "A"),
        ("The answer is B there is only one", "B"),
        ("Option A is what I choose.", "A"),
        ("Of A, B, C and D, the answer is C.", "C"),
        ("Option A is wrong. The answer is B.", "B"),
        ("The answer is B. I am sure that the answer is B!", "B"),
        # more than one, or none
        ("The answer is A or B.", None),
        ("The answer is A and C", None),
        ("The answer is (A)/(B)", None),
        ("The answer is A. No, the answer is B.", None),
        ("(A) or maybe (B)", None),
        ("Option A, option B or option C", None),
        ("The answer is not B.", None),
        ("The correct answer is E.", None),
        ("The correct answer is _.", None),
        ("The answer is A virus.", None),
        ("Answer: A's are many", None),
        ("Answer: Bacteria", None),
        ("A virus is small. Do you know?", None),
        ("", None),
        # the text of an option
        ("The correct answer is 10.", "C"),
        ("The correct answer is Unknown", "D"),
        ("the answer is: 1. That is all there is.", "B"),
        ("100", "A"),
        ("unknown.", "D"),
        ("It is unknown.", None),
        ("The correct answer is 1000.", None),
        ("10 or 100", None),
    ],
)
def test_letters(response, letter):
    assert parse_mmlu_response(QUESTION, response) == letter


def test_the_same_text_twice_is_no_choice():
    assert parse_mmlu_response({"options": ["x", "X", "y", "z"]}, "The answer is x.") is None
    assert parse_mmlu_response({"options": ["x", "X", "y", "z"]}, "The answer is y.") == "C"


def test_options_may_be_absent():
    assert parse_mmlu_response({}, "The answer is B.") == "B"
    assert parse_mmlu_response({}, "The answer is 10.") is None


@pytest.mark.parametrize(
    ("response", "number"),
    [
        ("Natalia sold 48/2 = 24 clips in May.\nNatalia sold 48+24 = 72 clips altogether in April and May.", "72"),
        ("Natalia sold twenty-four clips.", None),
        ("", None),
        ("72", "72"),
        ("The answer is 72.", "72"),
        ("5, 6 and 7, not more", "7"),
        ("#### 1,234", "1234"),
        ("It costs $1,234,567.50.", "1234567.50"),
        ("1,2,3", "3"),
        ("12,34", "34"),
        ("It is -5 degrees", "-5"),
        ("It is −5 degrees", "-5"),
        ("He owes -$5", "-5"),
        ("10-3", "3"),
        ("(4)-3", "3"),
        ("x-3", "3"),
        ("= -3", "-3"),
        ("0.5", "0.5"),
        ("p = .5", ".5"),
        ("-0.25%", "-0.25"),
        ("3.", "3"),
        ("the 3rd", "3"),
        ("3/4", "4"),
        ("10:30", "30"),
        ("٣", None),
    ],
)
def test_numbers(response, number):
    assert parse_gsm8k_response(response) == number


@given(st.integers(), st.text("abc .,-+$", max_size=9))
def test_a_number_after_any_text_is_found(number, text):
    assert parse_gsm8k_response(f"{text} {number:,} clips.") == str(number)


@given(st.text())
def test_any_text_is_answered(text):
    letter, number = parse_mmlu_response(QUESTION, text), parse_gsm8k_response(text)
    assert letter in {"A", "B", "C", "D", None}
    assert number is None or float(number) is not None


@pytest.mark.parametrize(
    "piece", ["1", ",111", "-", "(A)", "answer is ", "A or ", " ", "*", "answer is A or ", "$", "."]
)
def test_long_texts_take_no_time(piece):
    text = piece * (100_000 // len(piece))
    started = time.perf_counter()
    parse_mmlu_response(QUESTION, text)
    parse_gsm8k_response(text)
    assert time.perf_counter() - started < 2


@pytest.mark.parametrize(
    "text", ["The answer" + "\n" * 20_000, "The answer is:" + "\n " * 20_000, "answer: option" + " " * 20_000]
)
def test_long_stretches_of_white_space_take_no_time(text):
    """Each took minutes, in more than linear time, when white space could match in several ways."""
    started = time.process_time()
    assert parse_mmlu_response({"options": ["a", "b", "c", "d"]}, text) is None
    assert time.process_time() - started < 2
