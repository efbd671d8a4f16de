r"""The fast path: equality of answers that strings and exact numbers decide, in microseconds.

`quick_equal` says yes, no, or None: sympy must look at it. What counts as equal is decided here, in `comparison`
(order, brackets, names) and in `quantity` (units), not in sympy:

- Numbers are exact: 0.5 is \frac{1}{2}, but 0.33 is not \frac{1}{3}, nor is 0.333333.
- `50\%` is equal to 50, as truths keep or drop the sign, and to 0.5, which is its value; 50 is not equal to 0.5.
- `45^\circ` is equal to 45, as degrees are a unit, not to \frac{\pi}{4}; in \sin and its like they are converted.
- A number with a base, `506_7`, is equal to nothing but itself: neither to 506 nor to its value.
- Words that are set as text agree whatever their case and punctuation: `\text{(C)}` and C.
- A ratio is its quotient: 1:2 is 1/2.
"""

import re
from functools import lru_cache

from cs336_alignment.grading.arithmetic import evaluate, surely_different
from cs336_alignment.grading.comparison import shapes_equal
from cs336_alignment.grading.latex import canonical
from cs336_alignment.grading.quantity import quantity
from cs336_alignment.grading.structure import Group, Node, is_relation, parse

MAX_CHARACTERS = 500
"""A longer answer is none: it is equal to nothing but itself. The longest of the 12 500 in MATH has 159."""
MAX_NESTING = 20
"""Nor is one whose brackets are nested more deeply, which costs the parser seconds."""

_WITH_BASE = re.compile(r"-?[0-9][0-9A-Z]*(?:\.[0-9]+)?_\{[0-9]+\}")
_WORDS = re.compile(r"[a-zA-Z][a-zA-Z .'-]*")
_NOT_IN_WORDS = re.compile(r"\\text|[^\w:+-]")
_INFINITE = (r"\infty", r"-\infty")

_canonical = lru_cache(maxsize=4096)(canonical)


def quick_equal(answer: str, truth: str) -> bool | None:
    """Whether an answer is equal to the truth; None where strings and numbers do not tell."""
    answer, truth = answer.strip(), truth.strip()
    if not answer or not truth:
        return False
    if answer == truth:
        return True
    if any(len(text) > MAX_CHARACTERS or _nesting(text) > MAX_NESTING for text in (answer, truth)):
        return False
    return shapes_equal(*shapes(answer, truth), quick_leaf_equal)


def _nesting(text: str) -> int:
    depth = deepest = 0
    for character in text:
        if character in "([{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in ")]}":
            depth -= 1
    return deepest


def shapes(answer: str, truth: str) -> tuple[Node, Node]:
    """Both texts as shapes, where `70,110` is two numbers if the other text is a list, and one if not."""
    answer, truth = _canonical(answer), _canonical(truth)
    answer_shape, truth_shape = parse(answer), parse(truth)
    if isinstance(answer_shape, Group) and not isinstance(truth_shape, Group):
        truth_shape = parse(truth, thousands=False)
    elif isinstance(truth_shape, Group) and not isinstance(answer_shape, Group):
        answer_shape = parse(answer, thousands=False)
    return answer_shape, truth_shape


def quick_leaf_equal(answer: str, truth: str) -> bool | None:
    """`quick_equal` for texts without an inner shape, in canonical form."""
    if answer == truth:
        return True
    if (words := _words_equal(answer, truth)) is not None:
        return words
    if any(_WITH_BASE.fullmatch(text) or text in _INFINITE for text in (answer, truth)):
        return False
    if is_relation(answer) != is_relation(truth):
        return False
    verdicts = [_magnitudes_equal(*pair) for pair in magnitudes(answer, truth)]
    if True in verdicts:
        return True
    return None if None in verdicts else False


def magnitudes(answer: str, truth: str) -> list[tuple[str, str]]:
    """What must be compared once units are off: none where they contradict, two where one side is a percentage."""
    a, b = quantity(answer), quantity(truth)
    if a.unit and b.unit and a.unit != b.unit:
        return []
    pairs = [(a.magnitude, b.magnitude)]
    if a.unit == "percent" and not b.unit:
        pairs.append((f"({a.magnitude})/100", b.magnitude))
    if b.unit == "percent" and not a.unit:
        pairs.append((a.magnitude, f"({b.magnitude})/100"))
    return pairs


def _magnitudes_equal(answer: str, truth: str) -> bool | None:
    if answer == truth:
        return True
    if (a := evaluate(answer)) is None or (b := evaluate(truth)) is None:
        return None
    if surely_different(a, b):
        return False
    return None if isinstance(a, complex) or isinstance(b, complex) else True


def _words_equal(answer: str, truth: str) -> bool | None:
    r"""Compare what is words; None where at least one side may be mathematics.

    Words are what is set as text and has no number before it, and four letters or more without a sign between them.
    """
    a, b = quantity(answer).magnitude, quantity(truth).magnitude
    if r"\text" not in a + b and not all(len(text) > 3 and _WORDS.fullmatch(text) for text in (a, b)):
        return None
    a, b = (_NOT_IN_WORDS.sub("", text) for text in (answer, truth))
    return a == b or (len(a) > 1 and a.casefold() == b.casefold())
