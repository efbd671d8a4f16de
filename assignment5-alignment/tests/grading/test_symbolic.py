"""The slow path: equality that needs algebra."""

import pytest

from cs336_alignment.grading.symbolic import symbolically_equal

EQUAL = [
    ("1 + x", "x + 1"),
    ("(x+1)^2", "x^2 + 2x + 1"),
    (r"\frac{x^2}{x}", "x"),
    (r"2\sqrt{3}", r"\sqrt{12}"),
    (r"\frac{2}{\sqrt 2}", r"\sqrt 2"),
    (r"\sqrt{2+\sqrt3}", r"\frac{\sqrt6+\sqrt2}{2}"),
    (r"\sqrt[3]{-8}", "-2"),
    (r"0.5\pi", r"\frac{\pi}{2}"),
    (r"2\cos 15^\circ", r"\frac{\sqrt6+\sqrt2}{2}"),
    (r"\sin 77^\circ", r"\cos 13^{\circ}"),
    ("(2+i)(2-i)", "5"),
    (r"e^{i\pi}", "-1"),
    (r"\log_2 8", "3"),
    (r"\binom{5}{2}", "10"),
    (r"\frac{(n+1)!}{n!}", "n+1"),
    (r"\sum_{k=1}^{n} k", r"\frac{n(n+1)}{2}"),
    (r"\lfloor 2.5 \rfloor", "2"),
    ("2(13)", "26"),
    (r"\frac{2005}{2005!}", r"\frac{1}{2004!}"),
    (r"\sqrt{2} - \sqrt{2}", "0"),
    ("1:2", "0.5"),
    (r"50\pi\%", r"\frac{\pi}{2}"),
    ("2x + 3 = y", "y = 2x + 3"),
    (r"x = \frac{y-3}{2}", "y = 2x+3"),
    ("8x - 10y = -100", "4x - 5y = -50"),
    ("x > y", "y < x"),
    (r"8r^2 \geq s^2", r"s^2 \le 8r^2"),
    (r"\sqrt8, \sqrt3", r"\sqrt{3}, 2\sqrt2"),
    (r"( \sqrt{4}, x - x )", "(2, 0)"),
    (r"\frac12 \begin{pmatrix} 2 \\ 4 \end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    (r"[\sqrt{9}, \infty)", r"x \ge 3"),
]  # fmt: skip

DIFFERENT = [
    ("x + 1", "x + 2"),
    ("(x+1)^2", "x^2 + 2x - 1"),
    (r"\sqrt{x^2}", "x"),
    ("E", "e"),
    ("A + B", "a + b"),
    (r"0.3\pi", r"\frac{\pi}{3}"),
    (r"10^{40}\pi + 1", r"10^{40}\pi"),
    (r"\cos 13", r"\cos 13^\circ"),
    (r"\tan x", r"\cot x"),
    (r"\sin 3x", r"3 \sin x"),
    ("x = 9", "y = 9"),
    ("8x - 10y = 100", "4x - 5y = -50"),
    (r"8r^2 \leq s^2", r"s^2 \le 8r^2"),
    (r"\sqrt8, \sqrt5", r"\sqrt{3}, 2\sqrt2"),
    (r"\frac12 \begin{pmatrix} 2 \\ 5 \end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    (r"(\sqrt{9}, \infty)", r"x \ge 3"),
    (r"\frac{1}{2004!}", r"\frac{1}{2005!}"),
    (r"\frac{\pi}{10^{70}}", "0"),
    ("1/0", "2/0"),
    (r"5 \pmod 7", "5"),
    (r"\frac{1}{", "1"),
    ("SELECT * FROM answers; --", "7"),
    ("__import__('os').system('false')", "0"),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "truth"), EQUAL)
def test_equal(answer, truth):
    assert symbolically_equal(answer, truth) is True


@pytest.mark.parametrize(("answer", "truth"), DIFFERENT)
def test_different(answer, truth):
    assert symbolically_equal(answer, truth) is False
