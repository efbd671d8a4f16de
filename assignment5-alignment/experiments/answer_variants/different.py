"""Rules that make an answer slightly wrong, in ways that a careless grader would accept."""

import random
import re
from collections.abc import Iterator
from fractions import Fraction

from experiments.answer_variants.forms import (
    INTEGER,
    MATRIX,
    PAIR,
    SCALAR,
    TUPLE,
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


def wrong_number(truth: str, source: random.Random) -> Iterator[str]:
    numbers = list(re.finditer(r"(?<![_\d.])\d+(?![\d.])", truth))
    if numbers and r"\!" not in truth:
        found = source.choice(numbers)
        if found[0] != "0" or INTEGER.fullmatch(truth):
            yield f"{truth[: found.start()]}{int(found[0]) + source.choice([1, 2, 10])}{truth[found.end() :]}"


def wrong_sign(truth: str, _: random.Random) -> Iterator[str]:
    if SCALAR.fullmatch(truth) and re.search(r"[1-9]|\\pi", truth) and not re.search(r"[+-]", truth[1:]):
        yield truth[1:] if truth.startswith("-") else "-" + truth


def wrong_operator(truth: str, source: random.Random) -> Iterator[str]:
    if terms := terms_of_sum(truth):
        position = source.randrange(1, len(terms))
        flipped = {"+": "-", "-": "+"}[terms[position][0]] + terms[position][1:]
        yield "".join([*terms[:position], flipped, *terms[position + 1 :]])


def off_by_a_factor(truth: str, _: random.Random) -> Iterator[str]:
    if INTEGER.fullmatch(truth) and int(truth):
        yield truth + "0"
        yield str(2 * int(truth))
    elif (value := fraction(truth)) is not None and abs(value) != 1:
        yield latex(1 / value)
        yield latex(value / 10)
    elif found := re.fullmatch(r"(\d+)\\%", truth):
        yield found[1] + "00"
        yield decimal(Fraction(int(found[1]), 10_000))
        yield decimal(Fraction(int(found[1]), 1_000))


def rounded(truth: str, source: random.Random) -> Iterator[str]:
    if (value := fraction(truth)) is not None and not is_terminating(value):
        yield f"{float(value):.{source.randint(2, 6)}f}"
    elif found := re.fullmatch(r"(\d*) ?\\sqrt\{?(\d+)\}?", truth):
        yield f"{int(found[1] or 1) * int(found[2]) ** 0.5:.{source.randint(2, 6)}f}"
    elif found := re.fullmatch(r"(\d*) ?\\pi", truth):
        yield f"{int(found[1] or 1) * 3.14:.2f}"


def point_for_separator(truth: str, _: random.Random) -> Iterator[str]:
    if re.fullmatch(r"\d{4,6}", truth):
        yield f"{int(truth):,}".replace(",", ".")


def tuple_in_another_order(truth: str, _: random.Random) -> Iterator[str]:
    if (found := TUPLE.fullmatch(truth)) and r"\infty" not in truth:
        parts = [part.strip() for part in found[1].split(",")]
        if len(parts) > 1 and parts[0] != parts[1]:
            yield f"({', '.join([parts[1], parts[0], *parts[2:]])})"
            yield rf"\{{{', '.join(parts)}\}}"


def wrong_bracket(truth: str, _: random.Random) -> Iterator[str]:
    if (found := PAIR.fullmatch(truth.strip())) and (r"\infty" in truth or "[" in truth or "]" in truth):
        opening, low, high, closing = found[2], found[3].strip(), found[4].strip(), found[6]
        if r"\infty" not in low:
            yield f"{'(['[opening == '(']}{low}, {high}{closing}"
        if r"\infty" not in high:
            yield f"{opening}{low}, {high}{')]'[closing == ')']}"
    elif found and found[2] == "(" and found[6] == ")":
        yield f"[{found[3].strip()}, {found[4].strip()}]"


def wrong_list(truth: str, source: random.Random) -> Iterator[str]:
    if parts := parts_of_list(truth):
        yield ", ".join(parts[:-1])
        yield ", ".join([*parts, "1001"])
        changed = source.randrange(len(parts))
        yield ", ".join([*parts[:changed], "1001", *parts[changed + 1 :]])


def _matrix(rows: list[list[str]]) -> str:
    return r"\begin{pmatrix} " + r" \\ ".join(" & ".join(row) for row in rows) + r" \end{pmatrix}"


def wrong_matrix(truth: str, _: random.Random) -> Iterator[str]:
    if found := MATRIX.fullmatch(truth):
        rows = [[cell.strip() for cell in row.split("&")] for row in found[1].split(r"\\")]
        transposed = [list(column) for column in zip(*rows)]
        if transposed != rows:
            yield _matrix(transposed)
        if rows != rows[::-1]:
            yield _matrix(rows[::-1])


def wrong_unit(truth: str, _: random.Random) -> Iterator[str]:
    others = {"dollars": "cents", "cents": "dollars", "cm": "m", "inches": "feet", "feet": "inches", "hours": "minutes",
              "degrees": "radians", "minutes": "hours", "mph": "km", "meters": "feet", "km": "miles"}  # fmt: skip
    if (found := WITH_UNIT.fullmatch(truth)) and found[2] in others:
        yield rf"{found[1]} \text{{ {others[found[2]]} }}{found[3] or ''}"
        if found[2] in ("cm", "inches", "feet", "meters", "km"):
            yield rf"{found[1]} \text{{ {found[2]}}}^3"
    elif found := re.fullmatch(r"\\\$ ?([\d.]+)", truth):
        yield found[1] + r" \text{ cents}"
        yield found[1] + r"\%"
    elif found := re.fullmatch(r"(\d+)\^\{?\\circ\}?", truth):
        yield found[1] + r"\%"


def wrong_base(truth: str, _: random.Random) -> Iterator[str]:
    if found := re.fullmatch(r"(-?[\dA-F.]+)_\{?(\d+)\}?", truth):
        yield f"{found[1]}_{{{int(found[2]) + 1}}}"
        yield found[1]


def wrong_word(truth: str, source: random.Random) -> Iterator[str]:
    if found := WORD.fullmatch(truth):
        days = ["Monday", "Tuesday", "Wednesday", "Friday", "Saturday", "Sunday"]
        curves = ["circle", "ellipse", "parabola", "hyperbola"]
        kin = next((group for group in (days, curves, ["even", "odd", "neither"]) if found[1] in group), ["Nobody"])
        yield rf"\text{{{source.choice([word for word in kin if word != found[1]])}}}"
    elif found := re.fullmatch(r"\\text\{\(?([A-E])\)?\}", truth):
        yield rf"\text{{({source.choice([letter for letter in 'ABCDE' if letter != found[1]])})}}"


def wrong_variable(truth: str, _: random.Random) -> Iterator[str]:
    if (found := re.search(r"(?<![a-zA-Z\\])[xyzabn](?![a-zA-Z])", truth)) and not re.search("=|text|matrix", truth):
        yield re.sub(rf"(?<![a-zA-Z\\]){found[0]}(?![a-zA-Z])", "w", truth)
    if found := re.fullmatch(r"([a-z]) *= *(-?\d+)", truth):
        yield f"w = {found[2]}"


def root_forgotten(truth: str, _: random.Random) -> Iterator[str]:
    if re.search(r"\\sqrt\{[2-9]\d*\}", truth) and r"\sqrt[" not in truth:
        yield re.sub(r"\\sqrt\{(\d+)\}", r"(\1)", truth)


DIFFERENT: dict[str, Rule] = {
    "wrong number": wrong_number,
    "wrong sign": wrong_sign,
    "wrong operator": wrong_operator,
    "off by a factor": off_by_a_factor,
    "rounded": rounded,
    "point for separator": point_for_separator,
    "tuple in another order, or as a set": tuple_in_another_order,
    "wrong bracket": wrong_bracket,
    "wrong list": wrong_list,
    "wrong matrix": wrong_matrix,
    "wrong unit": wrong_unit,
    "wrong base": wrong_base,
    "wrong word": wrong_word,
    "wrong variable": wrong_variable,
    "root forgotten": root_forgotten,
}
