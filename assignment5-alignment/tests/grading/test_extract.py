"""Finding the answer in a response."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cs336_alignment.grading.extract import extract_answer, extract_boxed


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{1}, no: \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{ 5 }", "5"),
        (r"\fbox{5}", "5"),
        (r"\boxed 2$.", "2"),
        (r"\boxed {7}", "7"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x \right.} and more", r"\left\{ x \right."),  # an escaped brace pairs with nothing
        (r"\boxed{x \\ {y}}", r"x \\ {y}"),
        (r"\boxed{}", ""),
        (r"\boxed{1} and \boxed{2", None),  # cut short: what it was about to say is unknown
        (r"\boxed", None),
        (r"\boxedfive", None),
        ("5", None),
        ("", None),
    ],
)
def test_the_last_box_is_the_answer(text, answer):
    assert extract_boxed(text) == answer


_PLAIN = st.text("ab1$ ", max_size=4) | st.sampled_from([r"\frac", r"\{", r"\}", r"\\\\"])
_BALANCED = st.recursive(_PLAIN, lambda inner: inner.map("{{{}}}".format) | st.tuples(inner, inner).map("".join))


@settings(deadline=None)
@given(_BALANCED)
def test_a_box_gives_back_what_was_put_in(content):
    assert extract_boxed(rf"first \boxed{{no}}, then \boxed{{{content}}} }}}} end") == content.strip()


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("2 + 2 </think> <answer> 4 </answer>", "4"),
        ("</think> <answer>4</answer> so much for that", "4"),
        ("</think> <answer> 3 </answer> wait </think> <answer> 4 </answer>", "4"),
        (r"</think> <answer> It is \boxed{\frac{1}{2}}. </answer>", r"\frac{1}{2}"),
        (r"</think> <answer> \boxed{4 </answer>", ""),  # right in format, but no answer
        ("</think> <answer></answer>", ""),
        ("</think><answer> 4 </answer>", None),  # the space is part of the format
        ("</think>\n<answer> 4 </answer>", None),
        ("</think> <answer> 4", None),
        ("<answer> 4 </answer>", None),
        ("4", None),
    ],
)
def test_an_r1_zero_answer_needs_its_tags(text, answer):
    assert extract_answer(text) == answer


@pytest.mark.parametrize("text", ["\\boxed{" * 50_000, "\\boxed" * 50_000, "\\boxed{" + "{}" * 200_000])
def test_long_responses_take_linear_time(text):
    started = time.process_time()
    assert extract_boxed(text) is None
    assert extract_answer("</think> <answer>" * 20_000 + text + "</answer>") == ""
    assert time.process_time() - started < 5  # quadratic time would be minutes
