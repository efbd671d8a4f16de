"""Comparing two shapes, with three possible results.

The caller passes a function that compares their parts. It may return None, for undecided. The comparison of shapes is
False if some part differs, True if all parts are equal, and None otherwise.
"""

from collections.abc import Callable

from cs336_alignment.grading.structure import Group, Leaf, Matrix, Named, Node, Sequence, is_relation

LeafEqual = Callable[[str, str], bool | None]

_MAX_PARTS = 64  # no real answer lists more, and all pairs of parts are compared


def shapes_equal(a: Node, b: Node, leaf_equal: LeafEqual) -> bool | None:
    r"""Whether two answers are equal; None if `leaf_equal` cannot decide.

    - Lists and sets have no order, and may equal each other. Unions have no order either, and may equal only unions.
    - Tuples and intervals have an order: (1, 2) is neither (2, 1) nor [1, 2], nor a set. A bare list `1, 2` is equal to
      the tuple (1, 2) if the order is the same, because many write a point without brackets.
    - A column vector may equal a tuple.
    - A name may be omitted: `x = 5` is equal to 5, but not to `y = 5`; `x > 5` is equal to (5, \infty).
    - A set with one element is equal to its element.
    """
    if a == b:
        return True
    match a, b:
        case Leaf(), Leaf():
            return leaf_equal(a.text, b.text)
        case Named(), Named():
            return shapes_equal(a.value, b.value, leaf_equal) if a.name == b.name else leaf_equal(a.text, b.text)
        case Named(), _:
            if isinstance(b, Leaf) and is_relation(b.text):
                return leaf_equal(a.text, b.text)
            return shapes_equal(a.value, b, leaf_equal)
        case _, Named():
            return shapes_equal(b, a, lambda x, y: leaf_equal(y, x))
        case Group(), Group():
            if (a.kind == "union") != (b.kind == "union"):
                return False
            return _equal_in_some_order(a.parts, b.parts, leaf_equal)
        case (Sequence(), Sequence()):
            if (a.opening, a.closing) != (b.opening, b.closing):
                return False
            return _equal_in_order(a.parts, b.parts, leaf_equal)
        case (Sequence("(", parts, ")"), Group("list", others)) | (Group("list", parts), Sequence("(", others, ")")):
            return _equal_in_order(parts, others, leaf_equal)
        case Matrix(), Matrix():
            if [len(row) for row in a.rows] != [len(row) for row in b.rows]:
                return False
            return _equal_in_order(sum(a.rows, ()), sum(b.rows, ()), leaf_equal)
        case (Sequence("(", parts, ")"), Matrix(rows)) | (Matrix(rows), Sequence("(", parts, ")")):
            if any(len(row) != 1 for row in rows):
                return False
            pairs = (parts, sum(rows, ())) if isinstance(a, Sequence) else (sum(rows, ()), parts)
            return _equal_in_order(*pairs, leaf_equal)
        case (Matrix(text=left), Leaf(right)) | (Leaf(left), Matrix(text=right)):
            # The leaf may be a multiple of a matrix, or a sum.
            return leaf_equal(left, right) if r"\begin" in left and r"\begin" in right else False
        case (Group("set", (only,)), _):
            return shapes_equal(only, b, leaf_equal)
        case (_, Group("set", (only,))):
            return shapes_equal(a, only, leaf_equal)
    return False


def _equal_in_order(a: tuple[Node, ...], b: tuple[Node, ...], leaf_equal: LeafEqual) -> bool | None:
    if len(a) != len(b):
        return False
    verdict: bool | None = True
    for x, y in zip(a, b):
        match shapes_equal(x, y, leaf_equal):
            case False:
                return False
            case None:
                verdict = None
    return verdict


def _equal_in_some_order(a: tuple[Node, ...], b: tuple[Node, ...], leaf_equal: LeafEqual) -> bool | None:
    """Whether the parts can be paired off: a perfect matching, found by augmenting paths."""
    if len(a) != len(b) or len(a) > _MAX_PARTS:
        return False
    table = [[shapes_equal(x, y, leaf_equal) for y in b] for x in a]

    def matching_exists(allowed: tuple[bool | None, ...]) -> bool:
        partner: dict[int, int] = {}

        def augment(row: int, visited: set[int]) -> bool:
            for column in range(len(b)):
                if column not in visited and any(table[row][column] is verdict for verdict in allowed):
                    visited.add(column)
                    if column not in partner or augment(partner[column], visited):
                        partner[column] = row
                        return True
            return False

        return all(augment(row, set()) for row in range(len(a)))

    if matching_exists((True,)):
        return True
    return None if matching_exists((True, None)) else False
