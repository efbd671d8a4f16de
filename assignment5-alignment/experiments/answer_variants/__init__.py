"""Other spellings of an answer, and answers that are nearly the same, made by rules from the answer's LaTeX.

`EQUAL` rules keep the meaning, `DIFFERENT` rules change it. They share no code with the grader.
"""

import random
from dataclasses import dataclass

from experiments.answer_variants.different import DIFFERENT
from experiments.answer_variants.equal import EQUAL


@dataclass(frozen=True)
class Pair:
    """An answer, the truth that it was made from, and whether they are equal."""

    kind: str
    answer: str
    truth: str
    equal: bool


def pairs_from(truth: str, seed: int = 0) -> list[Pair]:
    """Make all variants of an answer."""
    made = []
    for rules, equal in ((EQUAL, True), (DIFFERENT, False)):
        for kind, rule in rules.items():
            source = random.Random(f"{seed} {kind} {truth}")
            made += [Pair(kind, answer, truth, equal) for answer in rule(truth, source) if answer != truth]
    return made
