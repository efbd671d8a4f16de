"""Whether two answers are equal: the fast path in this process, then sympy in a worker process."""

from cs336_alignment.grading.pool import WorkerPool
from cs336_alignment.grading.quick import quick_equal

SYMBOLIC = "cs336_alignment.grading.symbolic:symbolically_equal"
TIMEOUT_S = 5.0
"""Default time limit of a comparison by sympy, which takes about 20 ms for an ordinary pair on an idle core."""

_POOL = WorkerPool(SYMBOLIC, size=1)


def answers_equal(answer: str, truth: str, timeout_s: float = TIMEOUT_S) -> bool:
    r"""Whether an answer is mathematically equal to the truth; `quick` and `comparison` define what that means.

    No text can make it raise an exception. Most pairs take microseconds, the others at most `timeout_s`, after which
    the answer counts as wrong. The first of the latter starts a process, which takes some seconds more. It works in any
    thread.

    >>> answers_equal("0.5", r"\frac{1}{2}"), answers_equal("0.33", r"\frac{1}{3}"), answers_equal("x + 1", "1 + x")
    (True, False, True)

    Raises:
        RuntimeError: the process cannot be started.
    """
    verdict = quick_equal(answer, truth)
    if verdict is None:
        verdict = _POOL.map([(answer, truth)], timeout_s)[0]
    return verdict is True
