"""The fast path: comparisons that strings and exact numbers decide."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cs336_alignment.grading.quick import MAX_CHARACTERS, quick_equal

EQUAL = [
    ("0.5", r"\frac{1}{2}"),
    (r"50\%", "50"),
    (r"50\%", "0.5"),
    (r"33\frac{1}{3}\%", r"\frac{1}{3}"),
    (r"0.\overline{3}", r"\frac13"),
    ("1,234", "1234"),
    (r"1.234 \times 10^3", "1234"),
    (r"6\frac15", "31/5"),
    ("2^{10}", "1024"),
    ("-0", "0"),
    (r"\$4", "4 dollars"),
    ("12", r"12\text{ square units}"),
    (r"440\text{ square centimeters}", r"440\text{ cm}^2"),
    ("5 million", r"5{,}000{,}000"),
    ("45 degrees", r"45^\circ"),
    ("45", r"45^{\circ}"),
    ("(C)", r"\text{C}"),
    ("friday", r"\text{Friday}"),
    ("1:03 p.m.", r"\text{1:03 PM}"),
    ("x = 9", "9"),
    ("9", "x = 9"),
    ("2x + 3", "y = 2x+3"),
    ("3, 5", r"x = 3 \text{ or } x = 5"),
    ("110, 70", "70,110"),
    ("70110", "70,110"),
    (r"\pm \frac34", r"-\frac{3}{4}, \frac{3}{4}"),
    (r"( 0.5 , 2 )", r"\left( \frac{1}{2}, 2 \right)"),
    (r"(-\infty, 3] \cup (5, \infty)", r"(5,+\infty)∪(-∞,3]"),
    (r"-2 \leq x < 7", r"x \in [-2,7)"),
    (r"\begin{bmatrix} 0.5 \\ 3 \end{bmatrix}", r"\begin{pmatrix} 1/2 \\ 3 \end{pmatrix}"),
    (r"2\sqrt 3", r"2 \sqrt{3}"),
    ("$\\dfrac{\\pi}{6}$", r"\frac{\pi}6"),
]  # fmt: skip

DIFFERENT = [
    ("0.33", r"\frac13"),
    ("0.333333", r"\frac13"),
    ("50", "0.5"),
    (r"0.005", r"50\%"),
    (r"5\%", r"50\%"),
    ("1.234", "1,234"),
    ("10", "100"),
    ("61/5", r"6\frac15"),
    ("5 cents", r"\$5"),
    (r"440\text{ cm}", r"440\text{ cm}^2"),
    ("5 m", r"5\text{ cm}"),
    ("5 million", "5"),
    ("9 pm", r"9\text{ a.m.}"),
    ("506", "506_7"),
    ("250", "506_7"),
    ("506_8", "506_7"),
    ("D", r"\text{(C)}"),
    ("c", "C"),
    ("odd", r"\text{even}"),
    ("x+1", "x-1"),
    ("x", "y"),
    ("x_1", "x_2"),
    (r"2\sqrt{3}", r"3\sqrt{2}"),
    ("3.14", r"\pi"),
    (r"\infty", r"-\infty"),
    ("-50", "4x - 5y = -50"),
    ("(2, 1)", "(1, 2)"),
    ("[1, 2]", "(1, 2)"),
    (r"\{1, 2\}", "(1, 2)"),
    ("1, 2, 3", "1, 2"),
    ("1, 2", "123"),
    (r"(-\infty, 3)", r"(-\infty, 3]"),
    (r"x \leq -2 \text{ or } x > 3", r"(-\infty,-2) \cup (3,\infty)"),
    (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", r"\begin{pmatrix} 1 & 3 \\ 2 & 4 \end{pmatrix}"),
    ("", ""),
    ("", "5"),
    ("5", ""),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "truth"), EQUAL)
def test_equal(answer, truth):
    assert quick_equal(answer, truth) is True
    assert quick_equal(truth, answer) is True


@pytest.mark.parametrize(("answer", "truth"), DIFFERENT)
def test_different(answer, truth):
    assert quick_equal(answer, truth) is False
    assert quick_equal(truth, answer) is False


@pytest.mark.parametrize(
    ("answer", "truth"),
    [("1 + x", "x + 1"), (r"2\sqrt{3}", r"\sqrt{12}"), (r"\sin x", r"\cos x"), ("x = 1", "y = 1"), ("1:2", "0.5")],
)
def test_what_needs_algebra_is_left_open(answer, truth):
    assert quick_equal(answer, truth) is None


@settings(max_examples=40, deadline=None)
@given(st.fractions(max_denominator=10**6))
def test_a_number_is_equal_to_its_spellings_and_to_nothing_near(value):
    n, d = value.numerator, value.denominator
    spellings = [f"{n}/{d}", rf"\frac{{{n}}}{{{d}}}", rf"-\frac{{{-2 * n}}}{{{2 * d}}}", rf"${n} \div {d}$"]
    for spelling in spellings:
        assert quick_equal(spelling, rf"\dfrac{{{n}}}{{{d}}}") is True
        assert quick_equal(spelling, rf"\frac{{{n + 1}}}{{{d}}}") is False
        assert quick_equal(spelling, rf"\frac{{{10**9 * n + 1}}}{{{10**9 * d}}}") is False


@settings(max_examples=40, deadline=None)
@given(st.integers(), st.integers(0, 12))
def test_decimals_are_exact(digits, places):
    decimal = f"{digits // 10**places}.{digits % 10**places:0{places}d}" if digits >= 0 and places else str(digits)
    scale = 10**places if digits >= 0 else 1
    assert quick_equal(decimal, rf"\frac{{{digits}}}{{{scale}}}") is True
    assert quick_equal(decimal + "1" if "." in decimal else decimal + ".1", rf"\frac{{{digits}}}{{{scale}}}") is False


@settings(deadline=None)
@given(st.text(max_size=50), st.text(max_size=50))
def test_any_two_texts_can_be_compared(answer, truth):
    quick_equal(answer, truth)


@pytest.mark.parametrize("answer", ["{" * 100_000, "1" * 100_000, "(" * 500, "1+" * 10_000])
def test_what_is_too_long_or_too_deep_is_no_answer(answer):
    started = time.process_time()
    assert quick_equal(answer, "5") is False
    assert time.process_time() - started < 0.1
    assert quick_equal(answer, answer) is True
    assert quick_equal("1" * MAX_CHARACTERS, "1" * MAX_CHARACTERS + ".0") is False
