"""The canonical spelling of answers."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cs336_alignment.grading.latex import canonical


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"$\left( \dfrac12,\, 10,\!080 \right)$.", r"(\frac{1}{2}, 10080)"),
        (r"\( \tfrac{8\pi}5 \)", r"\frac{8\pi}{5}"),
        (r"\frac\pi2", r"\frac{\pi}{2}"),
        ("sqrt(1 + sqrt(2))", r"\sqrt{1+\sqrt{2}}"),
        ("√12 + x²", r"\sqrt{12}+x^{2}"),
        ("x^10 + x_12", "x^{10}+x_{12}"),
        ("2**(n+1) * 3", r"2^{n+1}\cdot3"),
        ("3½", r"3\frac{1}{2}"),
        ("−5 × 10³", r"-5\cdot10^{3}"),
        ("10 000", "10000"),
        (r"10\,000", "10000"),
        ("1{,}000", "1000"),
        ("1,000", "1,000"),  # a separator or a list: not for this function to say
        ("6 1/5", r"6\frac{1}{5}"),
        ("61/5", r"\frac{61}{5}"),
        ("1/2x", r"\frac{1}{2}x"),
        ("12 square units", "12 square units"),
        (r"12\text{ square" + "\n" + "units}", r"12\text{square units}"),
        (r"144 \mbox{ m}^3", r"144\text{m}^{3}"),
        (r"\text{C,E}", "C, E"),
        (r"\text{Ann and Bob}", r"\text{Ann}, \text{Bob}"),
        (r"\text{1:03 PM}", r"1:03\text{PM}"),
        (r"1:03 p.m.", r"1:03\text{pm}"),
        (r"x=2 \text{ or } x=3", "x=2, x=3"),
        (r"7, -2, \text{ and } -5", "7, -2, -5"),
        (r"\textbf{(C)}", r"\text{(C)}"),
        (r"\mathbf{v} = 3\mathbf{i}", "v=3i"),
        (r"90^{\circ}", "90°"),
        (r"\$5", "$5"),
        (r"65 \%", "65%"),
        ("x <= 3", r"x\le3"),
        (r"\left[\begin{array}{cc} 1 & 2\\ 3 & 4\end{array}\right]", r"\begin{matrix}1&2\cr3&4\end{matrix}"),
        (r"\begin{bmatrix} 1 \\ -2 \end{bmatrix}", r"\begin{matrix}1\cr-2\end{matrix}"),
        (r"\begin{vmatrix} 1 \end{vmatrix}", r"\begin{vmatrix}1\end{vmatrix}"),  # a determinant is another thing
        (r"\\frac{1}{2}", r"\frac{1}{2}"),
        ("**42**", "42"),
        ("", ""),
    ],
)
def test_spellings(text, expected):
    assert canonical(text) == expected
    assert canonical(expected) in (expected, expected.replace("$", ""))  # a bare $ opens mathematics


@settings(deadline=None)
@given(st.text(max_size=60) | st.text(r"\{}[]()^_$%,. 0123abfrctex+-/=°√²½", max_size=60))
def test_any_text_has_a_spelling(text):
    canonical(text)


@pytest.mark.parametrize(
    "piece",
    [
        "{",
        "\\frac",
        "\\frac{",
        "^",
        "(",
        "sqrt(",
        "\\text{",
        "1 ",
        "1,",
        "1/",
        " ",
        "\\",
        "and ",
        "[\\begin{array}",
        "\\frac{{1}{",
    ],
)
def test_no_rule_backtracks(piece):
    started = time.process_time()
    canonical(piece * (1000 // len(piece)))
    assert time.process_time() - started < 0.5
