"""Comparing shapes, with leaves that are equal, different or undecided."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cs336_alignment.grading.comparison import shapes_equal
from cs336_alignment.grading.latex import canonical
from cs336_alignment.grading.structure import Group, Leaf, parse


def leaf_equal(a: str, b: str) -> bool | None:
    """`?` is open; all else is compared as text."""
    return None if "?" in a + b else a == b


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ("1, 2", "2, 1", True),
        ("1, 2", r"\{2, 1\}", True),
        ("1, 1, 2", "1, 2, 2", False),
        ("1, 2", "1, 2, 3", False),
        ("(1, 2)", "(2, 1)", False),
        ("(1, 2)", "[1, 2]", False),
        ("(1, 2]", "[1, 2)", False),
        ("(1, 2)", r"\{1, 2\}", False),
        ("(1, 2)", "1, 2", True),
        ("(1, 2)", "2, 1", False),
        ("[1, 2]", "1, 2", False),
        ("(1, 2, 3)", "(1, 2)", False),
        (r"(0,1) \cup (2,3)", r"(2,3) \cup (0,1)", True),
        (r"(0,1) \cup (2,3)", "(0,1), (2,3)", False),
        (r"(0,1) \cup (2,3)", r"(0,1) \cup [2,3)", False),
        ("x = 5", "5", True),
        ("x = 5", "x = 5", True),
        ("x = 5", "y = 5", False),
        ("x = 5", "6", False),
        ("x > 5", r"(5, \infty)", True),
        ("x > 5", r"[5, \infty)", False),
        (r"\{5\}", "5", True),
        ("5", "5, 6", False),
        (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", r"\begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix}", True),
        (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", r"\begin{pmatrix} 1 & 3 \\ 2 & 4 \end{pmatrix}", False),
        (r"\begin{pmatrix} 1 & 2 \end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", False),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", "(1, 2)", True),
        (r"\begin{pmatrix} 1 & 2 \end{pmatrix}", "(1, 2)", False),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", "5", False),
        ("(1, ?)", "(1, 2)", None),
        ("(1, ?)", "(3, 2)", False),
        ("1, ?", "2, 1", None),
        ("1, ?", "2, 3", False),
        ("1, ?, ?", "2, 3, 1", None),
        ("?, ?, 1", "2, 3, 4", False),
        ("1," * 300 + "2", "2," + "1," * 299 + "1", False),  # too long to look at every order
    ],
)  # fmt: skip
def test_equality_of_shapes(a, b, expected):
    a, b = parse(canonical(a)), parse(canonical(b))
    assert shapes_equal(a, b, leaf_equal) is expected
    assert shapes_equal(b, a, leaf_equal) is expected


@settings(deadline=None)
@given(st.lists(st.sampled_from("12?"), max_size=5), st.lists(st.sampled_from("123"), max_size=5))
def test_unordered_parts_are_paired_as_trying_all_orders_does(a, b):
    def in_order(xs, ys):
        verdicts = [x == y or leaf_equal(x, y) for x, y in zip(xs, ys)]
        return False if False in verdicts else None if None in verdicts else True

    tried = {in_order(a, order) for order in itertools.permutations(b)} if len(a) == len(b) else {False}
    expected = True if True in tried else None if None in tried else False
    groups = (Group("list", tuple(map(Leaf, parts))) for parts in (a, b))
    assert shapes_equal(*groups, leaf_equal) is expected
