"""Rules that write the same answer in another way."""

import random
import re
from collections.abc import Iterator
from fractions import Fraction

from experiments.answer_variants.forms import (
    DECIMAL,
    INTEGER,
    MATRIX,
    PAIR,
    SCALAR,
    WITH_UNIT,
    WORD,
    Rule,
    decimal,
    fraction,
    is_terminating,
    latex,
    parts_of_list,
    terms_of_sum,
)


def fraction_as_decimal(truth: str, _: random.Random) -> Iterator[str]:
    if (value := fraction(truth)) is not None and is_terminating(value):
        yield decimal(value)


def fraction_spelt_otherwise(truth: str, source: random.Random) -> Iterator[str]:
    if (value := fraction(truth)) is not None:
        n, d, sign = abs(value.numerator), value.denominator, "-" * (value < 0)
        yield f"{value.numerator}/{d}"
        yield rf"\frac{{{sign}{n}}}{{{d}}}"
        yield rf"{sign}\tfrac{{{n}}}{{{d}}}"
        factor = source.randint(2, 9)
        yield rf"{sign}\dfrac{{{n * factor}}}{{{d * factor}}}"
        if n < 10 and d < 10:
            yield rf"{sign}\frac{n}{d}"
        if n > d > 1:
            yield rf"{sign}{n // d}\frac{{{n % d}}}{{{d}}}"
            yield f"{sign}{n // d} {n % d}/{d}"


def number_spelt_otherwise(truth: str, _: random.Random) -> Iterator[str]:
    if INTEGER.fullmatch(truth):
        yield truth + ".0"
        yield rf"\frac{{{2 * int(truth)}}}{{2}}"
        if abs(int(truth)) >= 1000:
            with_commas = f"{int(truth):,}"
            yield with_commas
            yield with_commas.replace(",", r",\!")
            yield with_commas.replace(",", "{,}")
            yield with_commas.replace(",", r"\,")
        if abs(int(truth)) >= 10:
            digits = truth.lstrip("-")
            mantissa = f"{'-' * truth.startswith('-')}{digits[0]}.{digits[1:]}"
            yield rf"{mantissa} \times 10^{{{len(digits) - 1}}}"
            yield f"{mantissa}e{len(digits) - 1}"
    elif found := DECIMAL.fullmatch(truth):
        sign, whole, decimals = found.groups()
        yield truth + "0"
        yield latex(Fraction(truth))
        yield f"{sign}.{decimals}" if int(whole or "0") == 0 and whole else f"{sign}{whole or '0'}.{decimals}"
    elif r",\!" in truth and re.fullmatch(r"[\d,\\! ]+", truth):
        yield re.sub(r"[^\d]", "", truth)


def percent(truth: str, _: random.Random) -> Iterator[str]:
    if found := re.fullmatch(r"(\d+(?:\.\d+)?)\\%", truth):
        yield found[1]
        yield found[1] + "%"
        yield found[1] + r" \text{ percent}"
        yield decimal(Fraction(found[1]) / 100)
        yield latex(Fraction(found[1]) / 100)


def units(truth: str, source: random.Random) -> Iterator[str]:
    if found := WITH_UNIT.fullmatch(truth):
        number, words, power = found.groups()
        yield number
        yield rf"{number}\mathrm{{ {words} }}{power or ''}"
        if not power:
            yield f"{number} {words}"
    elif found := re.fullmatch(r"\\\$ ?(-?[\d.]+)", truth):
        yield found[1]
        yield "$" + found[1]
        yield found[1] + " dollars"
    elif found := re.fullmatch(r"(-?\d+)\^\{?\\circ\}?", truth):
        yield from (found[1], found[1] + "°", found[1] + " degrees", rf"{found[1]} \text{{ degrees}}")
    elif INTEGER.fullmatch(truth) and source.random() < 0.2:
        yield truth + r" \text{ square units}"


def layout(truth: str, _: random.Random) -> Iterator[str]:
    yield f"${truth}$"
    yield rf"\( {truth} \)"
    if not re.search(r"\\text|\\mbox|[A-Za-z]{3}|\d \d", re.sub(r"\\[a-zA-Z]+", "", truth)) and "!" not in truth:
        yield re.sub(r"(?<=[\d})\]]) *(?=[-+,=)\]])", r"\\, ", truth)
    if "(" in truth and r"\left" not in truth and "matrix" not in truth and "[" not in truth:
        yield truth.replace("(", r"\left(").replace(")", r"\right)")
    if r"\left" in truth:
        yield truth.replace(r"\left", "").replace(r"\right", "")
    if r"\frac{" in truth:
        yield truth.replace(r"\frac{", r"\dfrac{")


def name_in_front(truth: str, _: random.Random) -> Iterator[str]:
    if SCALAR.fullmatch(truth):
        yield f"x = {truth}"
    elif found := re.fullmatch(r"[a-z] *= *([^=]+)", truth):
        yield found[1]


def words(truth: str, _: random.Random) -> Iterator[str]:
    if found := WORD.fullmatch(truth):
        yield from (found[1], found[1].lower(), rf"\textbf{{{found[1]}}}")
    elif found := re.fullmatch(r"\\text\{\(?([A-Z])\)?\}", truth):
        yield from (found[1], f"({found[1]})", rf"\textbf{{({found[1]})}}")


def list_in_another_order(truth: str, source: random.Random) -> Iterator[str]:
    if parts := parts_of_list(truth):
        shuffled = source.sample(parts, len(parts))
        yield ", ".join(shuffled)
        yield rf"\{{{', '.join(shuffled)}\}}"
        yield ", ".join(shuffled[:-1]) + r" \text{ and } " + shuffled[-1]


def union_in_another_order(truth: str, _: random.Random) -> Iterator[str]:
    if r"\cup" in truth:
        yield r" \cup ".join(part.strip() for part in reversed(truth.split(r"\cup")))
        yield truth.replace(r"\cup", "∪").replace(r"\infty", "∞")


def interval_as_inequality(truth: str, _: random.Random) -> Iterator[str]:
    found = PAIR.fullmatch(truth.strip())
    if found and (truth.count(r"\infty") == 1 or found[2] + found[6] in ("[)", "(]")):
        opening, low, high, closing = found[2], found[3].strip(), found[4].strip(), found[6]
        below = {"(": "<", "[": r"\le"}[opening]
        above = {")": "<", "]": r"\leq"}[closing]
        yield " ".join(
            ([] if r"\infty" in low else [low, below]) + ["x"] + ([] if r"\infty" in high else [above, high])
        )


def matrix_spelt_otherwise(truth: str, _: random.Random) -> Iterator[str]:
    if found := MATRIX.fullmatch(truth):
        yield truth.replace("pmatrix", "bmatrix")
        yield rf"\left(\begin{{array}}{{ccc}}{found[1]}\end{{array}}\right)"
        yield re.sub(r"(-?)(\d+)/(\d+)", r"\1\\frac{\2}{\3}", truth)
        if "&" not in truth:
            yield f"({','.join(found[1].split(chr(92) * 2))})"


def root_spelt_otherwise(truth: str, _: random.Random) -> Iterator[str]:
    if found := re.fullmatch(r"(\d+) ?\\sqrt\{(\d+)\}", truth):
        a, b = int(found[1]), int(found[2])
        yield rf"\sqrt{{{a * a * b}}}"
        yield rf"{a} \cdot {b}^{{1/2}}"
        yield rf"\frac{{{a * b}}}{{\sqrt{{{b}}}}}"
        yield f"{a}√{b}"
    elif re.search(r"\\sqrt\{\d\}", truth):
        yield re.sub(r"\\sqrt\{(\d)\}", r"\\sqrt \1", truth)
    if found := re.fullmatch(r"\\frac\{(\d*)\\sqrt\{(\d+)\}\}\{(\d+)\}", truth):
        yield rf"\frac{{{found[1] or 1}}}{{{found[3]}}}\sqrt{{{found[2]}}}"
        yield rf"{found[1]}\sqrt{{{found[2]}}}/{found[3]}"


def multiple_of_pi_spelt_otherwise(truth: str, _: random.Random) -> Iterator[str]:
    if found := re.fullmatch(r"(-?)(\d+) ?\\pi", truth):
        yield from (rf"{found[1]}\pi \cdot {found[2]}", f"{truth.replace(chr(92) + 'pi', 'π')}")
    if found := re.fullmatch(r"(-?)\\frac\{(\d*) ?\\pi\}\{(\d+)\}", truth):
        yield rf"{found[1]}{found[2]}\pi/{found[3]}"
        yield rf"{found[1]}\frac{{{found[2] or 1}}}{{{found[3]}}}\pi"


def terms_in_another_order(truth: str, source: random.Random) -> Iterator[str]:
    if terms := terms_of_sum(truth):
        signed = [term if term[0] in "+-" else "+" + term for term in terms]
        yield "".join(source.sample(signed, len(signed))).removeprefix("+")
        yield "-(" + "".join({"+": "-", "-": "+"}[term[0]] + term[1:] for term in signed).removeprefix("+") + ")"


def equation_spelt_otherwise(truth: str, _: random.Random) -> Iterator[str]:
    sides = truth.split("=")
    if len(sides) == 2 and re.search(r"[a-z]", truth) and r"\text" not in truth:
        left, right = (side.strip() for side in sides)
        yield f"{right} = {left}"
        if not re.fullmatch(r"[a-z]", left):
            yield f"2({left}) = 2({right})"
            yield f"{left} - ({right}) = 0"


EQUAL: dict[str, Rule] = {
    "fraction as decimal": fraction_as_decimal,
    "fraction spelt otherwise": fraction_spelt_otherwise,
    "number spelt otherwise": number_spelt_otherwise,
    "percent": percent,
    "units": units,
    "layout": layout,
    "name in front": name_in_front,
    "words": words,
    "list in another order": list_in_another_order,
    "union in another order": union_in_another_order,
    "interval as inequality": interval_as_inequality,
    "matrix spelt otherwise": matrix_spelt_otherwise,
    "root spelt otherwise": root_spelt_otherwise,
    "multiple of pi spelt otherwise": multiple_of_pi_spelt_otherwise,
    "terms in another order": terms_in_another_order,
    "equation spelt otherwise": equation_spelt_otherwise,
}
