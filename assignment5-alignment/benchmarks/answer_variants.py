r"""Other spellings of an answer, and answers that are nearly it: by rules, from the answer's LaTeX.

Every rule is a function of an answer that yields texts; a rule that does not fit yields none. `EQUAL` says the same
thing in other words, `DIFFERENT` something else that a careless grader would accept. They know nothing of the grader.
"""

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

Rule = Callable[[str, random.Random], Iterator[str]]

_INTEGER = re.compile(r"-?\d+")
_DECIMAL = re.compile(r"(-?)(\d*)\.(\d+)")
_FRACTION = re.compile(r"(-?)\\[dt]?frac(?:\{(\d+)\}\{(\d+)\}|(\d)(\d))")
_SCALAR = re.compile(r"-?(?:\d|\\[dt]?frac|\\sqrt|\\pi)(?:[\d{}+\- ]|\\[dt]?frac|\\sqrt|\\pi|\\cdot)*")
_PAIR = re.compile(r"(\\left)? *([(\[]) *([^,()\[\]]+),([^,()\[\]]+?) *(\\right)? *([)\]])")
_TUPLE = re.compile(r"(?:\\left)? *\( *([^()\[\]]+?) *(?:\\right)? *\)")
_MATRIX = re.compile(r"\\begin\{pmatrix\}(.*)\\end\{pmatrix\}", re.DOTALL)
_WITH_UNIT = re.compile(r"(-?[\d.]+) *\\(?:text|mbox) *\{ *([a-z][a-z ]*[a-z]) *\}(\^\d)?")
_WORD = re.compile(r"\\text\{([A-Za-z]{2,})\}")


@dataclass(frozen=True)
class Pair:
    """An answer, the truth that it was made from, and whether they are equal."""

    kind: str
    answer: str
    truth: str
    equal: bool


def pairs_from(truth: str, seed: int = 0) -> list[Pair]:
    """All variants of an answer."""
    made = []
    for rules, equal in ((EQUAL, True), (DIFFERENT, False)):
        for kind, rule in rules.items():
            source = random.Random(f"{seed} {kind} {truth}")
            made += [Pair(kind, answer, truth, equal) for answer in rule(truth, source) if answer != truth]
    return made


def _fraction(text: str) -> Fraction | None:
    if not (found := _FRACTION.fullmatch(text)):
        return None
    sign, n, d, n1, d1 = found.groups()
    return Fraction(int(sign + (n or n1)), int(d or d1))


def _is_terminating(value: Fraction) -> bool:
    denominator = value.denominator
    for prime in (2, 5):
        while denominator % prime == 0:
            denominator //= prime
    return denominator == 1


def _decimal(value: Fraction) -> str:
    return f"{Decimal(value.numerator) / Decimal(value.denominator):f}"


def _latex(value: Fraction) -> str:
    return rf"{'-' * (value < 0)}\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"


# The same in other words.


def fraction_as_decimal(truth: str, _: random.Random) -> Iterator[str]:
    if (value := _fraction(truth)) is not None and _is_terminating(value):
        yield _decimal(value)


def fraction_spelt_otherwise(truth: str, source: random.Random) -> Iterator[str]:
    if (value := _fraction(truth)) is not None:
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
    if _INTEGER.fullmatch(truth):
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
    elif found := _DECIMAL.fullmatch(truth):
        sign, whole, decimals = found.groups()
        yield truth + "0"
        yield _latex(Fraction(truth))
        yield f"{sign}.{decimals}" if int(whole or "0") == 0 and whole else f"{sign}{whole or '0'}.{decimals}"
    elif r",\!" in truth and re.fullmatch(r"[\d,\\! ]+", truth):
        yield re.sub(r"[^\d]", "", truth)


def percent(truth: str, _: random.Random) -> Iterator[str]:
    if found := re.fullmatch(r"(\d+(?:\.\d+)?)\\%", truth):
        yield found[1]
        yield found[1] + "%"
        yield found[1] + r" \text{ percent}"
        yield _decimal(Fraction(found[1]) / 100)
        yield _latex(Fraction(found[1]) / 100)


def units(truth: str, source: random.Random) -> Iterator[str]:
    if found := _WITH_UNIT.fullmatch(truth):
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
    elif _INTEGER.fullmatch(truth) and source.random() < 0.2:
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
    if _SCALAR.fullmatch(truth):
        yield f"x = {truth}"
    elif found := re.fullmatch(r"[a-z] *= *([^=]+)", truth):
        yield found[1]


def words(truth: str, _: random.Random) -> Iterator[str]:
    if found := _WORD.fullmatch(truth):
        yield from (found[1], found[1].lower(), rf"\textbf{{{found[1]}}}")
    elif found := re.fullmatch(r"\\text\{\(?([A-Z])\)?\}", truth):
        yield from (found[1], f"({found[1]})", rf"\textbf{{({found[1]})}}")


def _list(truth: str) -> list[str]:
    """The parts of a bare list without brackets, or none."""
    parts = [part.strip() for part in truth.split(",")]
    is_list = len(parts) > 1 and not re.search(r"[()\[\]]|\\!|\\text|\\cup|matrix|\\\{|\{,", truth)
    return parts if is_list and not re.fullmatch(r"\d{1,3}(,\d{3})+", truth) else []


def list_in_another_order(truth: str, source: random.Random) -> Iterator[str]:
    if parts := _list(truth):
        shuffled = source.sample(parts, len(parts))
        yield ", ".join(shuffled)
        yield rf"\{{{', '.join(shuffled)}\}}"
        yield ", ".join(shuffled[:-1]) + r" \text{ and } " + shuffled[-1]


def union_in_another_order(truth: str, _: random.Random) -> Iterator[str]:
    if r"\cup" in truth:
        yield r" \cup ".join(part.strip() for part in reversed(truth.split(r"\cup")))
        yield truth.replace(r"\cup", "∪").replace(r"\infty", "∞")


def interval_as_inequality(truth: str, _: random.Random) -> Iterator[str]:
    found = _PAIR.fullmatch(truth.strip())
    if found and (truth.count(r"\infty") == 1 or found[2] + found[6] in ("[)", "(]")):
        opening, low, high, closing = found[2], found[3].strip(), found[4].strip(), found[6]
        below = {"(": "<", "[": r"\le"}[opening]
        above = {")": "<", "]": r"\leq"}[closing]
        yield " ".join(
            ([] if r"\infty" in low else [low, below]) + ["x"] + ([] if r"\infty" in high else [above, high])
        )


def matrix_spelt_otherwise(truth: str, _: random.Random) -> Iterator[str]:
    if found := _MATRIX.fullmatch(truth):
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


def _terms(truth: str) -> list[str]:
    """The terms of a sum, each but the first with its sign; none if there are less than two, or it is no mere sum."""
    if re.search(r"[()\[\],=]|\\text|\\left|\\%|\\\$|matrix|\\pm|\.$", truth):
        return []
    terms, depth = [""], 0
    for character in truth.replace(" ", ""):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if character in "+-" and depth == 0 and terms[-1]:
            terms.append("")
        terms[-1] += character
    return terms if len(terms) > 1 else []


def terms_in_another_order(truth: str, source: random.Random) -> Iterator[str]:
    if terms := _terms(truth):
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


# Something else.


def wrong_number(truth: str, source: random.Random) -> Iterator[str]:
    numbers = list(re.finditer(r"(?<![_\d.])\d+(?![\d.])", truth))
    if numbers and r"\!" not in truth:
        found = source.choice(numbers)
        if found[0] != "0" or _INTEGER.fullmatch(truth):
            yield f"{truth[: found.start()]}{int(found[0]) + source.choice([1, 2, 10])}{truth[found.end() :]}"


def wrong_sign(truth: str, _: random.Random) -> Iterator[str]:
    if _SCALAR.fullmatch(truth) and re.search(r"[1-9]|\\pi", truth) and not re.search(r"[+-]", truth[1:]):
        yield truth[1:] if truth.startswith("-") else "-" + truth


def wrong_operator(truth: str, source: random.Random) -> Iterator[str]:
    if terms := _terms(truth):
        position = source.randrange(1, len(terms))
        flipped = {"+": "-", "-": "+"}[terms[position][0]] + terms[position][1:]
        yield "".join([*terms[:position], flipped, *terms[position + 1 :]])


def off_by_a_factor(truth: str, _: random.Random) -> Iterator[str]:
    if _INTEGER.fullmatch(truth) and int(truth):
        yield truth + "0"
        yield str(2 * int(truth))
    elif (value := _fraction(truth)) is not None and abs(value) != 1:
        yield _latex(1 / value)
        yield _latex(value / 10)
    elif found := re.fullmatch(r"(\d+)\\%", truth):
        yield found[1] + "00"
        yield _decimal(Fraction(int(found[1]), 10_000))
        yield _decimal(Fraction(int(found[1]), 1_000))


def rounded(truth: str, source: random.Random) -> Iterator[str]:
    if (value := _fraction(truth)) is not None and not _is_terminating(value):
        yield f"{float(value):.{source.randint(2, 6)}f}"
    elif found := re.fullmatch(r"(\d*) ?\\sqrt\{?(\d+)\}?", truth):
        yield f"{int(found[1] or 1) * int(found[2]) ** 0.5:.{source.randint(2, 6)}f}"
    elif found := re.fullmatch(r"(\d*) ?\\pi", truth):
        yield f"{int(found[1] or 1) * 3.14:.2f}"


def point_for_separator(truth: str, _: random.Random) -> Iterator[str]:
    if re.fullmatch(r"\d{4,6}", truth):
        yield f"{int(truth):,}".replace(",", ".")


def tuple_in_another_order(truth: str, _: random.Random) -> Iterator[str]:
    if (found := _TUPLE.fullmatch(truth)) and r"\infty" not in truth:
        parts = [part.strip() for part in found[1].split(",")]
        if len(parts) > 1 and parts[0] != parts[1]:
            yield f"({', '.join([parts[1], parts[0], *parts[2:]])})"
            yield rf"\{{{', '.join(parts)}\}}"


def wrong_bracket(truth: str, _: random.Random) -> Iterator[str]:
    if (found := _PAIR.fullmatch(truth.strip())) and (r"\infty" in truth or "[" in truth or "]" in truth):
        opening, low, high, closing = found[2], found[3].strip(), found[4].strip(), found[6]
        if r"\infty" not in low:
            yield f"{'(['[opening == '(']}{low}, {high}{closing}"
        if r"\infty" not in high:
            yield f"{opening}{low}, {high}{')]'[closing == ')']}"
    elif found and found[2] == "(" and found[6] == ")":
        yield f"[{found[3].strip()}, {found[4].strip()}]"


def wrong_list(truth: str, source: random.Random) -> Iterator[str]:
    if parts := _list(truth):
        yield ", ".join(parts[:-1])
        yield ", ".join([*parts, "1001"])
        changed = source.randrange(len(parts))
        yield ", ".join([*parts[:changed], "1001", *parts[changed + 1 :]])


def _matrix(rows: list[list[str]]) -> str:
    return r"\begin{pmatrix} " + r" \\ ".join(" & ".join(row) for row in rows) + r" \end{pmatrix}"


def wrong_matrix(truth: str, _: random.Random) -> Iterator[str]:
    if found := _MATRIX.fullmatch(truth):
        rows = [[cell.strip() for cell in row.split("&")] for row in found[1].split(r"\\")]
        transposed = [list(column) for column in zip(*rows)]
        if transposed != rows:
            yield _matrix(transposed)
        if rows != rows[::-1]:
            yield _matrix(rows[::-1])


def wrong_unit(truth: str, _: random.Random) -> Iterator[str]:
    others = {"dollars": "cents", "cents": "dollars", "cm": "m", "inches": "feet", "feet": "inches", "hours": "minutes",
              "degrees": "radians", "minutes": "hours", "mph": "km", "meters": "feet", "km": "miles"}  # fmt: skip
    if (found := _WITH_UNIT.fullmatch(truth)) and found[2] in others:
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
    if found := _WORD.fullmatch(truth):
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


# No answer at all.

_PIECES = [
    r"\frac", "{", "}", "(", ")", "[", "]", "^", "_", r"\sqrt", r"\pi", "+", "-", "*", "/", "=", "<", r"\le", ",",
    " ", "1", "2", "37", "0.5", "x", "y", "i", "e", "!", "%", "$", r"\$", r"\%", r"\cup", r"\infty", r"\text{",
    "and", "or", "|", "&", r"\begin{pmatrix}", r"\end{pmatrix}", r"\\", "\\", r"\left", r"\right", "é", "∞", "²",
    "½", "√", "\ud800", "\0", "\n", r"\sin", r"\log", r"\sum_{k=1}^{n}", r"\int", r"^\circ", r"\{", r"\}", r"\pm",
    ":", ";", ".", "'", '"', "#", "SELECT", "__import__", "10^{10}", "9" * 20, r"\binom", r"\lim_{x\to0}",
    r"\mathbb{R}", r"\in", r"\overline{", r"\cdot",
]  # fmt: skip


def noise(source: random.Random, answers: list[str]) -> str:
    """A text that no one wrote: random pieces of LaTeX, a damaged answer, random characters, one piece repeated."""
    choice = source.random()
    if choice < 0.4:
        return "".join(source.choices(_PIECES, k=source.randint(1, 12)))
    if choice < 0.8:
        damaged = list(source.choice(answers))
        for _ in range(source.randint(1, 4)):
            start = source.randrange(len(damaged) + 1)
            damaged[start : start + source.randint(0, 2)] = source.choice([[], [source.choice(_PIECES)]])
        return "".join(damaged)
    if choice < 0.9:
        return "".join(chr(source.choice([source.randrange(32, 127), source.randrange(0x110000)])) for _ in range(20))
    return source.choice(_PIECES) * source.randint(1, 400)
