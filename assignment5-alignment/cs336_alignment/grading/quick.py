r"""The fast path: comparisons of answers that strings and exact numbers decide, in microseconds.

`quick_equal` returns True, False, or None if sympy must decide. What counts as equal is defined here, in `comparison`
(order, brackets, names) and in `quantity` (units), not by sympy:

- Numbers are exact: 0.5 is \frac{1}{2}, but 0.33 is not \frac{1}{3}, nor is 0.333333.
- `50\%` is equal to 50, because true answers may omit the sign, and to 0.5, its value; 50 is not equal to 0.5.
- `45^\circ` is equal to 45, because degrees are a unit, but not to \frac{\pi}{4}; inside \sin etc. they are converted.
- A number with a base, `506_7`, is equal only to itself: neither to 506 nor to its value.
- Words set as text are compared without case and punctuation: `\text{(C)}` is equal to C.
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
"""A longer answer is equal only to itself. The longest of the 12 500 answers in MATH has 159 characters."""
MAX_NESTING = 20
"""An answer with more deeply nested brackets, which take the parser seconds, is also equal only to itself."""

_WITH_BASE = re.compile(r"-?[0-9][0-9A-Z]*(?:\.[0-9]+)?_\{[0-9]+\}")
_WORDS = re.compile(r"[a-zA-Z][a-zA-Z .'-]*")
_NOT_IN_WORDS = re.compile(r"\\text|[^\w:+-]")
_INFINITE = (r"\infty", r"-\infty")

_canonical = lru_cache(maxsize=4096)(canonical)


def quick_equal(answer: str, truth: str) -> bool | None:
    """Whether an answer is equal to the truth; None if strings and numbers cannot decide."""
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
    """Parse both texts as shapes. `70,110` is read as two numbers if the other text is a list, otherwise as one."""
    answer, truth = _canonical(answer), _canonical(truth)
    answer_shape, truth_shape = parse(answer), parse(truth)
    if isinstance(answer_shape, Group) and not isinstance(truth_shape, Group):
        truth_shape = parse(truth, thousands=False)
    elif isinstance(truth_shape, Group) and not isinstance(answer_shape, Group):
        answer_shape = parse(answer, thousands=False)
    return answer_shape, truth_shape


def quick_leaf_equal(answer: str, truth: str) -> bool | None:
    """Apply `quick_equal` to texts in canonical form that have no inner structure."""
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
    """Remove units and return the pairs to compare: none if the units differ, two if one side is a percentage."""
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
    r"""Compare words; None if at least one side may be mathematics.

    Words are text in `\text{...}` without a number before it, or at least four letters without a sign between them.
    """
    a, b = quantity(answer).magnitude, quantity(truth).magnitude
    if r"\text" not in a + b and not all(len(text) > 3 and _WORDS.fullmatch(text) for text in (a, b)):
        return None
    a, b = (_NOT_IN_WORDS.sub("", text) for text in (answer, truth))
    return a == b or (len(a) > 1 and a.casefold() == b.casefold())
