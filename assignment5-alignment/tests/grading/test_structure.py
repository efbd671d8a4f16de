"""The shapes of answers."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cs336_alignment.grading.latex import canonical
from cs336_alignment.grading.structure import Group, Leaf, Matrix, Named, Sequence, is_relation, parse


def shape(text: str, thousands: bool = True):
    """Describe a shape briefly: brackets and kinds with their parts."""

    def short(node):
        match node:
            case Leaf(text):
                return text
            case Group(kind, parts):
                return (kind, *map(short, parts))
            case Sequence(opening, parts, closing):
                return (opening + closing, *map(short, parts))
            case Matrix(rows):
                return ("matrix", *(tuple(map(short, row)) for row in rows))
            case Named(name, value):
                return (name + "=", short(value))

    return short(parse(canonical(text), thousands))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5", "5"),
        ("(5)", "5"),
        ("+5", "5"),
        ("1, 2; 3", ("list", "1", "2", "3")),
        (r"\{1, 2\}", ("set", "1", "2")),
        ("(1, 2)", ("()", "1", "2")),
        ("[1, 2)", ("[)", "1", "2")),
        (r"\langle 1, 2 \rangle", ("()", "1", "2")),
        ("(1, 2), (3, 4)", ("list", ("()", "1", "2"), ("()", "3", "4"))),
        ("(x+1)(x+2)", "(x+1)(x+2)"),  # the brackets are not each other's
        ("f(1, 2)", "f(1, 2)"),
        ("(1,234)", ("()", "1", "234")),  # between brackets a comma separates
        ("1,234", "1,234"),
        ("1,234, 5", ("list", "1,234", "5")),
        (r"(0,1) \cup (2, 3]", ("union", ("()", "0", "1"), ("(]", "2", "3"))),
        (r"1 \pm \sqrt{2}", ("list", r"1+\sqrt{2}", r"1-\sqrt{2}")),
        (r"\{1 \pm x, -2\}", ("set", "1+x", "1-x", "-2")),
        (r"\pm 5", ("list", "5", "-5")),
        ("x = 5", ("x=", "5")),
        ("f(x) = x + 1", ("f(x)=", "x+1")),
        ("x = 2 + 5 = 7", ("x=", "7")),
        (r"\angle ABC = 45^\circ", (r"\angle ABC=", "45°")),
        ("(x, y) = (1, 2)", ("(x, y)=", ("()", "1", "2"))),
        (r"\frac{10}{2} = 5", (r"\frac{10}{2}=", "5")),
        ("x = 1, x = 2", ("list", ("x=", "1"), ("x=", "2"))),
        ("4x - 5y = -50", "4x-5y=-50"),
        (r"x \in [-2,7]", ("x=", ("[]", "-2", "7"))),
        ("x > 3", ("x=", ("()", "3", r"\infty"))),
        (r"3 \geq x", ("x=", ("(]", r"-\infty", "3"))),
        (r"-2 \le x < 7", ("x=", ("[)", "-2", "7"))),
        ("7 > x > -2", ("x=", ("()", "-2", "7"))),
        (r"x < 1 \text{ or } x > 2", ("x=", ("union", ("()", r"-\infty", "1"), ("()", "2", r"\infty")))),
        (r"s^2 \le 8r^2", r"s^{2}\le8r^{2}"),
        (r"\mathbb{R}", ("()", r"-\infty", r"\infty")),
        (r"\begin{pmatrix} 1 & 2 \\ x & (1,2) \end{pmatrix}", ("matrix", ("1", "2"), ("x", ("()", "1", "2")))),
        (r"2\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"2\begin{matrix}1\cr2\end{matrix}"),
        ("(1, 2", "(1, 2"),  # brackets that do not pair hold nothing
        ("", ""),
    ],
)  # fmt: skip
def test_shapes(text, expected):
    assert shape(text) == expected


def test_a_comma_between_digits_is_read_as_asked():
    assert shape("70,110") == "70,110"
    assert shape("70,110", thousands=False) == ("list", "70", "110")


def test_relations_are_seen_outside_brackets_only():
    assert is_relation("x+y=3")
    assert is_relation(r"x\ne3")
    assert not is_relation(r"\sum_{k=1}^{n}k")


@settings(deadline=None)
@given(st.text(r"\{}[]()<>=,;&1x ", max_size=40) | st.text(max_size=40))
def test_every_text_has_a_shape(text):
    parse(text)
    parse(canonical(text), thousands=False)


def test_deep_nesting_is_cut_off():
    assert isinstance(parse("(" * 400 + "1,2" + ")" * 400), Leaf)
