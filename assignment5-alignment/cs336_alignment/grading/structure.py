"""Parsing the shape of an answer: a list, a set, a tuple, an interval, a union, a matrix, or a value with a name."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

_MAX_DEPTH = 12


@dataclass(frozen=True)
class Leaf:
    """An expression, an equation or words."""

    text: str


@dataclass(frozen=True)
class Group:
    """Parts without an order: `1, 2` is a list, `\\{1, 2\\}` a set, `(0, 1) \\cup (2, 3)` a union."""

    kind: str
    parts: tuple["Node", ...]


@dataclass(frozen=True)
class Sequence:
    """Parts in order between brackets: a point, a vector, or an interval. `(` and `[` are different brackets."""

    opening: str
    parts: tuple["Node", ...]
    closing: str


@dataclass(frozen=True)
class Matrix:
    """Cells in rows."""

    rows: tuple[tuple["Node", ...], ...]
    text: str


@dataclass(frozen=True)
class Named:
    """`x = 5`, `f(x) = x + 1`, `x \\in [0, 1]`, or an inequality, which is an interval with a name."""

    name: str
    value: "Node"
    text: str


Node = Leaf | Group | Sequence | Matrix | Named

_TOKEN = re.compile(r"\\[a-zA-Z]+|\\.|.", re.DOTALL)
_OPENING = frozenset(["(", "[", "{", r"\{", r"\langle", r"\begin"])
_CLOSING = frozenset([")", "]", "}", r"\}", r"\rangle", r"\end"])
_ROUND = {r"\langle": "(", r"\rangle": ")"}
_THOUSANDS = re.compile(r"(?<![0-9,.])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9]|,[0-9])")
_RELATIONS = ("=", "<", ">", r"\le", r"\ge", r"\in")
_NAME = re.compile(
    r"(?:m?\\angle ?)?[a-zA-Z]+'?(?:_\{\w+\})?(?:\^\{-1\})?(?:\([a-zA-Z0-9, ]*\))?"
    r"|\\(?:theta|alpha|beta|phi|lambda)|\\text\{[^{}]*\}|\\overline\{[A-Z]+\}|\([a-z](?:, ?[a-z])*\)"
)
_PLUS_MINUS = re.compile(r"\\(pm|mp)(?![a-z]) ?")
_NUMBER = re.compile(r"(?:[-+0-9/^!(){}. ]|\\(?:frac|cdot|sqrt|pi)(?![a-z]))+")


@lru_cache(maxsize=4096)
def parse(text: str, thousands: bool = True) -> Node:
    r"""Parse the shape of a canonical text (`latex.canonical`).

    A comma between digits is ambiguous: `70,110` may be one number or two. With `thousands`, a comma at the position of
    a thousands separator and without a space after it is read as one, except inside brackets.
    """
    return _parse_list(text, thousands, depth=0)


def is_relation(text: str) -> bool:
    """Whether a text is an equation, an inequality or another relation."""
    return len(_split(text, (*_RELATIONS, r"\ne", r"\approx", r"\equiv"))) > 1


def _parse_list(text: str, thousands: bool, depth: int) -> Node:
    masked = _THOUSANDS.sub(lambda match: match[0].replace(",", "\0"), text) if thousands else text
    parts = [part.replace("\0", ",") for part in _split(masked, (",", ";"))]
    if len(parts) == 1 or depth > _MAX_DEPTH:
        return _parse_item(text, depth)
    items = _flat(_parse_item(part, depth) for part in parts)
    names = {item.name if isinstance(item, Named) and isinstance(item.value, Sequence) else "" for item in items}
    if len(names) == 1 and (name := names.pop()):  # x < 1 or x > 2
        return Named(name, Group("union", tuple(item.value for item in items if isinstance(item, Named))), text)
    return Group("list", items)


def _parse_item(text: str, depth: int) -> Node:
    text = text.strip().removeprefix("+")
    if depth > _MAX_DEPTH:
        return Leaf(text)
    if named := _parse_relation(text, depth):
        return named
    if len(sets := _split(text, (r"\cup",))) > 1:
        return Group("union", _flat(_parse_item(part, depth + 1) for part in sets))
    if text == r"\mathbb{R}":
        return Sequence("(", (Leaf(r"-\infty"), Leaf(r"\infty")), ")")
    if bracketed := _parse_brackets(text, depth):
        return bracketed
    if _PLUS_MINUS.search(text):
        return Group("list", (Leaf(_with_signs(text, "+", "-")), Leaf(_with_signs(text, "-", "+"))))
    return Leaf(text)


def _with_signs(text: str, plus_minus: str, minus_plus: str) -> str:
    signs = {"pm": plus_minus, "mp": minus_plus}
    return _PLUS_MINUS.sub(lambda sign: signs[sign[1]], text).removeprefix("+")


def _parse_relation(text: str, depth: int) -> Named | None:
    """Parse relations such as `x = 5` or `10/2 = 5`; None if no side is just a name or a number."""
    sides, relations = _split_with_separators(text, _RELATIONS)
    kinds = set(relations)
    if not relations or "" in sides:
        return None
    if kinds <= {"=", r"\in"}:
        is_name = _NAME.fullmatch(sides[0]) or _NUMBER.fullmatch(sides[0])
        return Named(sides[0], _parse_item(sides[-1], depth + 1), text) if is_name else None
    if kinds <= {">", r"\ge"}:
        sides, relations = sides[::-1], [{">": "<", r"\ge": r"\le"}[relation] for relation in relations[::-1]]
    elif not kinds <= {"<", r"\le"}:
        return None
    if len(sides) == 2:  # one end is infinite
        if _NAME.fullmatch(sides[0]):
            sides, relations = [r"-\infty", *sides], ["<", *relations]
        elif _NAME.fullmatch(sides[1]):
            sides, relations = [*sides, r"\infty"], [*relations, "<"]
    if len(sides) != 3 or not _NAME.fullmatch(sides[1]):
        return None
    opening, closing = "(" if relations[0] == "<" else "[", ")" if relations[1] == "<" else "]"
    ends = tuple(_parse_item(side, depth + 1) for side in (sides[0], sides[2]))
    return Named(sides[1], Sequence(opening, ends, closing), text)


def _parse_brackets(text: str, depth: int) -> Node | None:
    """Parse a text that begins and ends with a matching pair of brackets; None for any other text."""
    tokens = _TOKEN.findall(text)
    if len(tokens) < 2 or tokens[0] not in _OPENING or tokens[0] == "{" or tokens[-1] not in _CLOSING | {"}"}:
        return None
    if tokens[0] == r"\begin":
        return _parse_matrix(text, depth)
    level = 0
    for token in tokens[:-1]:
        level += (token in _OPENING) - (token in _CLOSING)
        if level == 0:
            return None
    opening, closing = tokens[0], tokens[-1]
    inner = text[len(opening) : -len(closing)]
    if (opening, closing) == ("(", ")") and len(_split(inner, (",", ";"))) == 1:
        return _parse_item(inner, depth + 1)
    parts = _flat(_parse_item(part, depth + 1) for part in _split(inner, (",", ";")))
    if (opening, closing) == (r"\{", r"\}"):
        return Group("set", parts)
    return Sequence(_ROUND.get(opening, opening), parts, _ROUND.get(closing, closing))


def _parse_matrix(text: str, depth: int) -> Matrix | None:
    start, end = r"\begin{matrix}", r"\end{matrix}"
    if not text.startswith(start) or text.find(end) != len(text) - len(end):
        return None
    rows = [_split(row, ("&",)) for row in text[len(start) : -len(end)].split(r"\cr")]
    if rows[-1] == [""]:
        rows.pop()
    return Matrix(tuple(tuple(_parse_item(cell, depth + 1) for cell in row) for row in rows), text)


def _flat(nodes: Iterable[Node]) -> tuple[Node, ...]:
    r"""Flatten nodes: `1 \pm 2` counts as two."""
    found: list[Node] = []
    for node in nodes:
        found += node.parts if isinstance(node, Group) and node.kind == "list" else [node]
    return tuple(found)


def _split(text: str, separators: tuple[str, ...]) -> list[str]:
    return _split_with_separators(text, separators)[0]


def _split_with_separators(text: str, separators: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Split a text at separators outside all brackets. A text with unmatched brackets is not split."""
    pieces, found, level, start = [], [], 0, 0
    for token in _TOKEN.finditer(text):
        level += (token[0] in _OPENING) - (token[0] in _CLOSING)
        if level < 0:
            return [text.strip()], []
        if level == 0 and token[0] in separators:
            pieces.append(text[start : token.start()].strip())
            found.append(token[0])
            start = token.end()
    if level:
        return [text.strip()], []
    return [*pieces, text[start:].strip()], found
