"""Values of arithmetic expressions, compared with Python's fractions and complex numbers."""

import cmath
import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cs336_alignment.grading.arithmetic import evaluate, surely_different
from cs336_alignment.grading.latex import canonical


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("007", 7),
        (".5", Fraction(1, 2)),
        ("5.", 5),
        ("1,234,567.5", Fraction("1234567.5")),
        ("1.5e-3", Fraction(3, 2000)),
        (r"1.5\cdot10^{3}", 1500),
        (r"-6\frac{1}{5}", Fraction(-31, 5)),
        (r"0.1\overline{6}", Fraction(1, 6)),
        (r".\overline{142857}", Fraction(1, 7)),
        (r"2^{-3}", Fraction(1, 8)),
        ("-2^{2}", -4),
        (r"2^{2^{3}}", 256),
        ("5!", 120),
        (r"\sqrt{\frac{9}{16}}", Fraction(3, 4)),
        (r"12\div4\cdot3", 9),
        ("2(3+4)", 14),
        ("(2)(3)", 6),
        ("-(-(3))", 3),
        ("--3", 3),
        ("{2}", 2),
    ],
)
def test_rational_values_are_exact(text, value):
    assert evaluate(text) == value
    assert isinstance(evaluate(text), Fraction)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (r"2\sqrt{3}", 2 * math.sqrt(3)),
        (r"\frac{\pi}{6}", math.pi / 6),
        (r"\sqrt{-4}", 2j),
        ("(2+i)(2-i)", 5),
        (r"e^{i\pi}", -1),
        (r"2^{\frac{1}{2}}", math.sqrt(2)),
    ],
)
def test_other_values_are_approximate(text, value):
    assert isinstance(evaluate(text), complex)
    assert cmath.isclose(evaluate(text), value)


@pytest.mark.parametrize(
    "text",
    ["", "+", "1 2", "1,2", "1,23", "(1", "1)", r"\frac{1}{0}", "1/0", "0^{0}", "0^{-1}", r"\sin x", "506_{7}", "x!",
     "(-1)!", "2000!", "9^{9^{9^{9}}}", "10^{10^{10}}", "((((9!)!)!)!)", "(" * 500 + "1" + ")" * 500, "1.2.3", "5%",
     r"6\frac{7}{5}", "1=1", "e^{1000}", "é", "\ud800"],
)  # fmt: skip
def test_what_is_no_arithmetic_or_out_of_reach_has_no_value(text):
    assert evaluate(text) is None


_LEAF = st.fractions(max_denominator=50).map(abs)


def _rendered(value: Fraction, style: int) -> str:
    n, d = value.numerator, value.denominator
    return [str(n) if d == 1 else rf"\frac{{{n}}}{{{d}}}", rf"\dfrac {{{n}}} {{{d}}}", f"({n}/{d})"][style]


_TREE = st.recursive(
    st.builds(lambda value, style: (value, _rendered(value, style)), _LEAF, st.integers(0, 2)),
    lambda inner: st.one_of(
        st.builds(lambda a, b: (a[0] + b[0], f"({a[1]} + {b[1]})"), inner, inner),
        st.builds(lambda a, b: (a[0] - b[0], rf"\left({a[1]}-{b[1]}\right)"), inner, inner),
        st.builds(lambda a, b: (a[0] * b[0], rf"({a[1]} \times {b[1]})"), inner, inner),
        st.builds(lambda a: (a[0] ** 2, f"({a[1]})^2"), inner),
        st.builds(lambda a: (-a[0], f"(-{a[1]})"), inner),
        st.builds(
            lambda a, b: (a[0] / b[0], rf"\frac{{{a[1]}}}{{{b[1]}}}"), inner, inner.filter(lambda node: node[0] != 0)
        ),
    ),
    max_leaves=6,
)


@settings(deadline=None)
@given(_TREE)
def test_any_expression_has_the_value_that_fractions_give(tree):
    value, text = tree
    assert evaluate(canonical(text)) == value


@settings(deadline=None)
@given(st.text(r"0123456789.,+-*/^!(){}\ xei", max_size=40))
def test_nothing_raises(text):
    evaluate(text)


def test_letters_tell_expressions_apart():
    def differ(a: str, b: str) -> bool:
        return surely_different(evaluate(a), evaluate(b))

    assert differ("x+1", "x-1")
    assert differ("x", "X")
    assert differ("x_{1}", "x_{2}")
    assert differ("ab", "a+b")
    assert differ(r"\alpha", r"\beta")
    assert not differ("(x+1)^{2}", "x^{2}+2x+1")
    assert not differ("ab", "ba")
    assert not differ(r"2\sqrt{3}", r"\sqrt{12}")


def test_exact_values_differ_by_any_amount_and_approximate_ones_by_more_than_rounding():
    assert surely_different(Fraction(1, 3), Fraction(333_333_333, 10**9))
    assert not surely_different(complex(1), Fraction(1) + Fraction(1, 10**12))
    assert not surely_different(Fraction(10**400), 1 + 0j)  # beyond floating point: cannot tell
