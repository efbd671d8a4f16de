r"""The value of an arithmetic expression: exact if it is rational, otherwise a floating-point number.

The canonical LaTeX of `latex.canonical` is parsed by recursive descent, in microseconds. Every letter stands for a
fixed number, so expressions with different values are different expressions. Equal floating-point values prove nothing;
then sympy must decide.
"""

import cmath
import math
import random
import re
from fractions import Fraction
from functools import lru_cache

Value = Fraction | complex

_TOKEN = re.compile(
    r"(?P<repeating>(?P<head>[0-9]*\.[0-9]*)\\overline\{(?P<period>[0-9]+)\})"
    r"|(?P<mixed>(?P<whole>[0-9]+)\\frac\{(?P<n>[0-9]+)\}\{(?P<d>[0-9]+)\})"
    r"|(?P<number>(?:[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]*)?|[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,4}(?![0-9]))?)"
    r"|(?P<symbol>\\(?:alpha|beta|gamma|theta|phi|lambda)(?![a-zA-Z])|[a-zA-Z](?:_\{[a-zA-Z0-9]{1,9}\})?'?)"
    r"|(?P<sign>\\[a-zA-Z]+|[-+/^!(){}])"
    r"|(?P<space> )"
)
_MAX_DEPTH = 40
_MAX_BITS = 20_000
_MAX_FACTORIAL = 1_000


class _UnreadableError(Exception):
    """The text is not arithmetic that this module can read, or its value cannot be computed."""


def evaluate(text: str) -> Value | None:
    r"""Compute the value of a canonical text; None if that is not possible here.

    The text may contain decimals (with thousands separators, a power of ten after `e`, or a repeating period under
    `\overline`), mixed numbers, the four operations, powers, factorials, `\frac`, `\sqrt`, `\pi`, `e`, `i`, and
    letters. A rational value is exact: 0.33 is not 1/3. A product without a sign binds more tightly than a quotient:
    a/bc is a/(bc).

    >>> evaluate(r"6\frac{1}{5}"), evaluate(r"1.5\cdot10^{3}"), evaluate(r"0.1\overline{6}")
    (Fraction(31, 5), Fraction(1500, 1), Fraction(1, 6))
    """
    try:
        reader = _Reader(text)
        value = reader.sum()
        reader.expect("")
    except (_UnreadableError, ArithmeticError):
        return None
    if isinstance(value, complex) and not cmath.isfinite(value):
        return None
    return value


def surely_different(a: Value, b: Value) -> bool:
    """Whether two values are so far apart that their expressions cannot be equal."""
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a != b
    try:
        a, b = complex(a), complex(b)
    except OverflowError:
        return False
    # Rounding errors stay far below this fraction of the larger value.
    return abs(a - b) > 1e-5 * max(abs(a), abs(b))


@lru_cache(maxsize=1024)
def _stand_in(symbol: str) -> complex:
    """Return the number that a symbol stands for, which is the same in every expression and process."""
    return complex(random.Random(symbol).uniform(0.5, 2.0))


class _Reader:
    """A recursive-descent parser. Each method reads one construct and returns its value."""

    def __init__(self, text: str) -> None:
        self.tokens: list[re.Match[str]] = []
        position = 0
        while position < len(text):
            token = _TOKEN.match(text, position)
            if token is None:
                raise _UnreadableError
            if token.lastgroup != "space":
                self.tokens.append(token)
            position = token.end()
        self.next = 0
        self.depth = 0

    def peek(self) -> str:
        return self.tokens[self.next][0] if self.next < len(self.tokens) else ""

    def take(self, *texts: str) -> str:
        """Read and return the next token, if it is one of these."""
        if (token := self.peek()) and token in texts:
            self.next += 1
            return token
        return ""

    def expect(self, text: str) -> None:
        if self.peek() != text:
            raise _UnreadableError
        self.next += 1

    def sum(self) -> Value:
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise _UnreadableError
        value = self.product()
        while sign := self.take("+", "-"):
            term = self.product()
            value = _add(value, term if sign == "+" else -term)
        self.depth -= 1
        return value

    def product(self) -> Value:
        value = self.signed()
        while sign := self.take(r"\cdot", "/", r"\div"):
            factor = self.signed()
            value = _multiply(value, factor if sign == r"\cdot" else _power(factor, Fraction(-1)))
        return value

    def signed(self) -> Value:
        sign = 1
        while token := self.take("+", "-"):
            sign = -sign if token == "-" else sign
        return sign * self.juxtaposition()

    def juxtaposition(self) -> Value:
        value = self.power()
        while self.next < len(self.tokens):
            kind = self.tokens[self.next].lastgroup
            if kind in ("number", "mixed", "repeating") and self.tokens[self.next - 1].lastgroup in (
                "number",
                "mixed",
                "repeating",
            ):
                raise _UnreadableError  # "1 2" is not a product
            if kind == "sign" and self.peek() not in ("(", "{", r"\frac", r"\sqrt", r"\pi"):
                break
            value = _multiply(value, self.power())
        return value

    def power(self) -> Value:
        value = self.atom()
        while self.take("!"):
            if not isinstance(value, Fraction) or value.denominator != 1 or not 0 <= value <= _MAX_FACTORIAL:
                raise _UnreadableError
            value = Fraction(math.factorial(int(value)))
        if self.take("^"):
            value = _power(value, self.power() if self.peek() != "{" else self.group("{", "}"))
        return value

    def group(self, opening: str, closing: str) -> Value:
        self.expect(opening)
        value = self.sum()
        self.expect(closing)
        return value

    def atom(self) -> Value:
        if self.next >= len(self.tokens):
            raise _UnreadableError
        token = self.tokens[self.next]
        text = token[0]
        if text == "(":
            return self.group("(", ")")
        if text == "{":
            return self.group("{", "}")
        self.next += 1
        match token.lastgroup:
            case "number":
                return Fraction(text.replace(",", ""))
            case "mixed":
                part = Fraction(int(token["n"]), int(token["d"]))
                if part >= 1:
                    raise _UnreadableError
                return int(token["whole"]) + part
            case "repeating":
                return _repeating(token["head"], token["period"])
            case "symbol":
                return {"e": complex(math.e), "i": 1j}.get(text) or _stand_in(text)
        match text:
            case r"\frac":
                numerator = self.group("{", "}")
                return _multiply(numerator, _power(self.group("{", "}"), Fraction(-1)))
            case r"\sqrt":
                return _power(self.group("{", "}"), Fraction(1, 2))
            case r"\pi":
                return complex(math.pi)
        raise _UnreadableError


def _repeating(head: str, period: str) -> Fraction:
    """Compute a repeating decimal: 0.1 with the period 6 is (16 - 1) / 90."""
    decimals = len(head) - head.index(".") - 1
    digits = head.replace(".", "")
    return Fraction(int(digits + period) - int(digits or "0"), (10 ** len(period) - 1) * 10**decimals)


def _add(a: Value, b: Value) -> Value:
    return a + b if isinstance(a, Fraction) and isinstance(b, Fraction) else complex(a) + complex(b)


def _multiply(a: Value, b: Value) -> Value:
    return a * b if isinstance(a, Fraction) and isinstance(b, Fraction) else complex(a) * complex(b)


def _power(base: Value, exponent: Value) -> Value:
    """Compute a power: exactly for integer exponents and for square roots of squares, otherwise the principal value."""
    if isinstance(base, Fraction) and isinstance(exponent, Fraction):
        bits = max(base.numerator.bit_length(), base.denominator.bit_length())
        if exponent.denominator == 1:
            if abs(exponent) * bits > _MAX_BITS or (base == 0 and exponent <= 0):
                raise _UnreadableError
            return base ** int(exponent)
        roots = math.isqrt(abs(base.numerator)), math.isqrt(base.denominator)
        if exponent == Fraction(1, 2) and base >= 0 and Fraction(roots[0] ** 2, roots[1] ** 2) == base:
            return Fraction(*roots)
    return complex(base) ** complex(exponent)
