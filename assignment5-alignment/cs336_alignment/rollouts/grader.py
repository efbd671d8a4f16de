"""Grading many responses at once, with a time limit for each."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
from types import TracebackType
from typing import Any

from cs336_alignment.grading.equality import SYMBOLIC, TIMEOUT_S
from cs336_alignment.grading.fork_server import FORK_SERVER
from cs336_alignment.grading.pool import WorkerPool
from cs336_alignment.grading.quick import quick_equal
from cs336_alignment.rollouts.rewards import EXTRACTORS, MATH_REWARDS, REWARDS, RewardFn, reward_dict

CACHE_SIZE = 100_000
"""Number of results that a grader remembers; the oldest are dropped."""

#: Grades responses, given with the true answers, and returns their rewards in the same order.
Grade = Callable[[Sequence[str], Sequence[str]], list[dict[str, float]]]


class Grader:
    """Grades many responses, with a hard time limit for each; a context manager.

    The functions in `MATH_REWARDS` are taken apart: finding the answer and the fast path of comparing it run in this
    process, and only comparisons that these cannot decide go to worker processes. The rewards are the same as those of
    the function itself. Any other function runs in the workers as a whole. They import it by the names of its module
    and of the function. Results are remembered, so a function must depend on its arguments alone.

    Args:
        reward_fn: a name in `MATH_REWARDS`, or a function.
        workers: maximum number of worker processes.
        timeout_s: time limit of one response, in seconds. An answer that takes longer counts as wrong.

    Raises:
        ValueError: there is no such reward function, or workers cannot import it; or a number is not positive.
    """

    def __init__(self, reward_fn: str | RewardFn, workers: int = 4, timeout_s: float = TIMEOUT_S) -> None:
        if isinstance(reward_fn, str):
            if reward_fn not in MATH_REWARDS:
                raise ValueError(f"reward function {reward_fn!r} is unknown; choose one of {', '.join(MATH_REWARDS)}")
            reward_fn = MATH_REWARDS[reward_fn]
        if workers < 1 or timeout_s <= 0:
            raise ValueError(f"workers is {workers} and timeout_s {timeout_s}, but both must be positive")
        self.timeout_s = timeout_s
        self.extract = EXTRACTORS.get(reward_fn)
        self.pool = WorkerPool(SYMBOLIC if self.extract else _import_name(reward_fn), workers)
        self._cache: dict[tuple[str, str], Any] = {}
        FORK_SERVER.start()  # its imports take a while, and can run while the first responses are generated

    def grade(self, responses: Sequence[str], truths: Sequence[str]) -> list[dict[str, float]]:
        """Compute the rewards of responses, in order.

        Args:
            responses: the model's responses.
            truths: the true answer to each.

        Raises:
            ValueError: the numbers of responses and truths differ.
            RuntimeError: the reward function raised an exception, or no worker can be started.
        """
        if len(responses) != len(truths):
            raise ValueError(f"there are {len(responses)} responses, but {len(truths)} true answers")
        if self.extract is None:
            return [dict(result or reward_dict(False, False)) for result in self._compute(list(zip(responses, truths)))]
        answers = [self.extract(response) for response in responses]
        stated = [(answer, truth) for answer, truth in zip(answers, truths) if answer is not None]
        verdicts = iter(self._compute(stated))
        return [reward_dict(answer is not None, answer is not None and next(verdicts) is True) for answer in answers]

    def _compute(self, pairs: Sequence[tuple[str, str]]) -> list[Any]:
        """Compare each pair: by the fast path if that decides, otherwise by the pool's function."""
        results: dict[tuple[str, str], Any] = {}
        for pair in dict.fromkeys(pairs):
            results[pair] = quick_equal(*pair) if self.extract else None
            if results[pair] is None:
                results[pair] = self._cache.get(pair, self)
        open_pairs = [pair for pair, result in results.items() if result is self]
        computed = dict(zip(open_pairs, self.pool.map(open_pairs, self.timeout_s)))
        self._cache |= computed
        while len(self._cache) > CACHE_SIZE:
            del self._cache[next(iter(self._cache))]
        results |= computed
        return [results[pair] for pair in pairs]

    def close(self) -> None:
        """Let the workers end."""
        self.pool.close()

    def __enter__(self) -> "Grader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _import_name(function: RewardFn) -> str:
    """Return the `module:name` by which another process can import a function."""
    module, name = getattr(function, "__module__", ""), getattr(function, "__qualname__", "")
    try:
        found = module != "__main__" and attrgetter(name)(sys.modules[module]) is function
    except (AttributeError, KeyError):
        found = False
    if not found:
        raise ValueError(
            f"worker processes cannot import the reward function {function!r}; define it at the top level of a module"
        )
    return f"{module}:{name}"


@contextmanager
def open_grader(name: str, workers: int) -> Iterator[Grade]:
    """Open a function that grades many responses at once with the reward function of this name.

    Comparing formulas can take any amount of time and is left to a `Grader`, whose worker processes have a time limit.
    The other reward functions take microseconds and run here.
    """
    if name in MATH_REWARDS:
        with Grader(name, workers) as grader:
            yield grader.grade
    else:
        function = REWARDS[name]
        yield lambda responses, truths: [function(*pair) for pair in zip(responses, truths, strict=True)]
