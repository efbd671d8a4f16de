"""A synthetic task for a model that is trained in minutes: an unlimited number of small sums with their working.

A question is a chain such as `5+1-2+3`, in which every intermediate result is a single digit. Its working is the list
of these results, `6 4 7`, and its answer is the last one. A small model easily learns each step of the working, but
hardly ever finds the answer straight away. A model that imitates responses of which only some show their working
therefore has something to discover by reinforcement learning.

Whether a problem is for training or held out depends on its text alone, so no choice of seeds and counts can mix them.
"""

import hashlib
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from cs336_alignment.datasets.example import Example

Split = Literal["train", "held_out"]

LARGEST_STEP = 3
_HELD_OUT_ONE_IN = 8


def make_problems(count: int, seed: int, *, split: Split = "train", steps: int = 6) -> list[Example]:
    """Draw distinct problems.

    Args:
        count: number of problems.
        seed: seed of the random choices.
        split: which problems; an eighth of all problems is held out, independently of the other arguments.
        steps: number of additions and subtractions in a problem, each by 1 to `LARGEST_STEP`.

    Raises:
        ValueError: `steps` is below 1, or there are fewer problems of this kind than asked for.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}, but a problem has at least 1")
    draws = random.Random(f"{seed} {split}")
    problems: dict[str, Example] = {}
    failures = 0
    while len(problems) < count:
        question, results = _draw(draws, steps)
        if question in problems or split_of(question) != split:
            failures += 1
            if failures > 100 * (count + 100):
                raise ValueError(
                    f"cannot find {count} different problems of {steps} steps (only {len(problems)}); "
                    "ask for fewer, or more steps"
                )
            continue
        problems[question] = Example(
            prompt=question,
            answer=str(results[-1]),
            solution=" ".join(map(str, results)),
            subject="arithmetic",
            level=f"{steps} steps",
            id=f"arithmetic/{split}/{question}",
        )
    return list(problems.values())


def _draw(draws: random.Random, steps: int) -> tuple[str, list[int]]:
    """Make a question, and the result of each of its steps."""
    value = draws.randrange(10)
    question, results = str(value), []
    for _ in range(steps):
        sizes = range(-LARGEST_STEP, LARGEST_STEP + 1)
        step = draws.choice([size for size in sizes if size and 0 <= value + size <= 9])
        value += step
        question += f"{step:+d}"
        results.append(value)
    return question, results


def split_of(question: str) -> Split:
    """Return the split that a problem belongs to. It depends on the text alone, so it is the same in every run."""
    digest = hashlib.blake2b(question.encode(), digest_size=8).digest()
    return "held_out" if int.from_bytes(digest, "big") % _HELD_OUT_ONE_IN == 0 else "train"


def r1_response(problem: Example, worked: bool = True) -> str:
    """Write a correct continuation of `<think>`: the working if asked for, then the answer, in R1-Zero's tags."""
    working = f" {problem.solution}" if worked else ""
    return f"{working} </think> <answer> {problem.answer} </answer>"


def save_problems(problems: Sequence[Example], path: Path) -> None:
    """Write problems as JSON lines that `load_examples` can read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {"question": problem.prompt, "trace": problem.solution, "answer": problem.answer, "id": problem.id}
        for problem in problems
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
