r"""Is this response right? Reward functions for mathematics, and what they are made of.

`extract` finds the answer in a response, and `latex` gives it one spelling. `structure`, `comparison`, `quantity` and
`arithmetic` make up `quick`, which decides most comparisons in microseconds. For the rest there is `symbolic`: sympy,
in worker processes (`worker`, `nursery`, `pool`) with a time limit. `equality`, `rewards` and `grader` put these
together.
"""

from cs336_alignment.grading.equality import answers_equal
from cs336_alignment.grading.extract import extract_answer, extract_boxed
from cs336_alignment.grading.grader import Grader
from cs336_alignment.grading.rewards import REWARD_FUNCTIONS, RewardFn, question_only_reward_fn, r1_zero_reward_fn

__all__ = [
    "REWARD_FUNCTIONS",
    "Grader",
    "RewardFn",
    "answers_equal",
    "extract_answer",
    "extract_boxed",
    "question_only_reward_fn",
    "r1_zero_reward_fn",
]
