"""Forms of an answer's LaTeX that the rules look for: numbers, pairs, matrices, units, lists and sums."""

import random
import re
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction

#: A function of an answer and a source of random numbers that yields texts, or none if it does not apply.
Rule = Callable[[str, random.Random], Iterator[str]]

INTEGER = re.compile(r"-?\d+")
DECIMAL = re.compile(r"(-?)(\d*)\.(\d+)")
FRACTION = re.compile(r"(-?)\\[dt]?frac(?:\{(\d+)\}\{(\d+)\}|(\d)(\d))")
SCALAR = re.compile(r"-?(?:\d|\\[dt]?frac|\\sqrt|\\pi)(?:[\d{}+\- ]|\\[dt]?frac|\\sqrt|\\pi|\\cdot)*")
PAIR = re.compile(r"(\\left)? *([(\[]) *([^,()\[\]]+),([^,()\[\]]+?) *(\\right)? *([)\]])")
TUPLE = re.compile(r"(?:\\left)? *\( *([^()\[\]]+?) *(?:\\right)? *\)")
MATRIX = re.compile(r"\\begin\{pmatrix\}(.*)\\end\{pmatrix\}", re.DOTALL)
WITH_UNIT = re.compile(r"(-?[\d.]+) *\\(?:text|mbox) *\{ *([a-z][a-z ]*[a-z]) *\}(\^\d)?")
WORD = re.compile(r"\\text\{([A-Za-z]{2,})\}")


def fraction(text: str) -> Fraction | None:
    """Read a fraction of two integers."""
    if not (found := FRACTION.fullmatch(text)):
        return None
    sign, n, d, n1, d1 = found.groups()
    return Fraction(int(sign + (n or n1)), int(d or d1))


def is_terminating(value: Fraction) -> bool:
    """Whether a fraction has finitely many decimals."""
    denominator = value.denominator
    for prime in (2, 5):
        while denominator % prime == 0:
            denominator //= prime
    return denominator == 1


def decimal(value: Fraction) -> str:
    """Write a fraction as a decimal."""
    return f"{Decimal(value.numerator) / Decimal(value.denominator):f}"


def latex(value: Fraction) -> str:
    """Write a fraction in LaTeX."""
    return rf"{'-' * (value < 0)}\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"


def parts_of_list(truth: str) -> list[str]:
    """Return the parts of a list without brackets; an empty list for anything else."""
    parts = [part.strip() for part in truth.split(",")]
    is_list = len(parts) > 1 and not re.search(r"[()\[\]]|\\!|\\text|\\cup|matrix|\\\{|\{,", truth)
    return parts if is_list and not re.fullmatch(r"\d{1,3}(,\d{3})+", truth) else []


def terms_of_sum(truth: str) -> list[str]:
    """Return the terms of a sum, with their signs; an empty list for anything else."""
    if re.search(r"[()\[\],=]|\\text|\\left|\\%|\\\$|matrix|\\pm|\.$", truth):
        return []
    terms, depth = [""], 0
    for character in truth.replace(" ", ""):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if character in "+-" and depth == 0 and terms[-1]:
            terms.append("")
        terms[-1] += character
    return terms if len(terms) > 1 else []
