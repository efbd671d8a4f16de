r"""The slow path: comparing expressions and equations with sympy.

This runs only in worker processes (`pool`), because importing sympy takes seconds, and a hostile expression can take
any amount of time and memory. latex2sympy2_extended, math-verify's parser, reads the LaTeX. Expressions are compared
by value at random points. Answers that are neither expressions nor equations are compared by math-verify.
"""

import random
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import sympy
from latex2sympy2_extended import latex2sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig
from math_verify import verify

from cs336_alignment.grading.comparison import shapes_equal
from cs336_alignment.grading.quick import magnitudes, quick_leaf_equal, shapes

_DIGITS = 60
_TOLERANCE = sympy.Float(10) ** -50
_SMALL = sympy.Float(10) ** -30
_CONFIG = ConversionConfig(lowercase_symbols=False)
_DECIMAL = re.compile(r"([0-9]*)\.([0-9]+)")
_PRODUCT = re.compile(r"(?<=[0-9)])\((?!\))")  # the parser would read 2(13) as a mixed number
_DEGREES = re.compile(r"([0-9]+|\{[^{}]*\}|\([^()]*\))°")


def symbolically_equal(answer: str, truth: str) -> bool:
    """Whether an answer is equal to the truth. An answer that cannot be read is equal only to itself."""
    return shapes_equal(*shapes(answer, truth), _leaf_equal) is True


def _leaf_equal(answer: str, truth: str) -> bool:
    verdict = quick_leaf_equal(answer, truth)
    if verdict is None:
        verdict = any(_expressions_equal(*pair) for pair in magnitudes(answer, truth))
    return verdict


def _expressions_equal(answer: str, truth: str) -> bool:
    try:
        a, b = _read(answer), _read(truth)
        if isinstance(a, sympy.Expr) and isinstance(b, sympy.Expr):
            return _values_equal(a, b)
        if isinstance(a, sympy.Eq) and isinstance(b, sympy.Eq):
            return _equations_equal(a, b)
        return verify(b, a, timeout_seconds=None)
    except MemoryError:  # the process has reached its memory limit and must end
        raise
    except Exception:  # the parser and sympy raise all kinds of exceptions
        return False


@lru_cache(maxsize=256)
def _read(text: str) -> Any:
    r"""Convert canonical LaTeX to a sympy expression: decimals exact, degrees in radians, `i` as imaginary unit."""
    text = _DECIMAL.sub(lambda match: rf"\frac{{{int(match[1] + match[2])}}}{{{10 ** len(match[2])}}}", text)
    text = _DEGREES.sub(r"(\1\\cdot\\pi/180)", text)
    text = _PRODUCT.sub(r"\\cdot(", text)
    text = text.replace("{matrix}", "{pmatrix}").replace(r"\cr", r"\\")
    expression = latex2sympy(text, normalization_config=None, conversion_config=_CONFIG)
    if expression.has(sympy.Sum, sympy.Product, sympy.Integral, sympy.Derivative, sympy.Limit):
        expression = expression.doit()
    expression = expression.replace(_is_odd_root_of_negative, lambda power: sympy.real_root(power.base, power.exp.q))
    imaginary = {symbol: sympy.I for symbol in expression.free_symbols if symbol.name == "i"}
    return expression.subs(imaginary) if imaginary else expression


def _is_odd_root_of_negative(part: sympy.Basic) -> bool:
    r"""Whether a part is like \sqrt[3]{-8}, which means -2 and not sympy's principal value."""
    return bool(
        isinstance(part, sympy.Pow)
        and part.base.is_negative
        and part.exp.is_Rational
        and part.exp.p == 1
        and part.exp.q % 2
    )


def _equations_equal(a: sympy.Eq, b: sympy.Eq) -> bool:
    """Whether two equations are the same except for a constant factor."""
    left, right = a.lhs - a.rhs, b.lhs - b.rhs
    (point,) = _points(left.free_symbols | right.free_symbols, 1)
    left_value, right_value = left.subs(point), right.subs(point)
    if left_value == 0 or right_value == 0:
        return False
    return _values_equal(left * right_value, right * left_value)


def _values_equal(a: sympy.Expr, b: sympy.Expr) -> bool:
    """Compare expressions by value, at several points if they have variables.

    Two expressions that agree to 50 digits at random points on both sides of zero are considered identical (Schwartz
    1980). sympy's `simplify` takes longer and misses many identities. It decides only if there are no values to
    compare, or if they are so large or small that 50 digits prove little.
    """
    if a == b:
        return a.is_finite is not False  # 1/0 is not 2/0
    symbols = a.free_symbols | b.free_symbols
    compared = 0
    for point in _points(symbols, 8):
        x, y = (sympy.N(expression, _DIGITS, subs=point) for expression in (a, b))
        if not (x.is_number and y.is_number and x.is_finite and y.is_finite):
            continue
        scale = max(abs(x), abs(y))
        if scale < _SMALL:  # perhaps the remainder of terms that cancel
            continue
        if abs(x - y) > scale * _TOLERANCE:
            return False
        compared += bool(scale < 1 / _SMALL)
        if compared == 4:
            break
    if compared:
        return True
    return sympy.simplify(a - b) == 0


def _points(symbols: set[sympy.Symbol], count: int) -> Iterator[dict[sympy.Symbol, sympy.Rational]]:
    """Yield random values for symbols, the same in every run. Without symbols there is a single, empty point."""
    source = random.Random(0)
    for _ in range(count if symbols else 1):
        yield {symbol: sympy.Rational(source.randrange(-3000, 3000), 1009) for symbol in sorted(symbols, key=str)}
