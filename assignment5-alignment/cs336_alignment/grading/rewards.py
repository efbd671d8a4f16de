r"""Reward functions: a response and the true answer in, a dictionary of floats out.

The entries have the course's names. `format_reward` is 1 if an answer can be found in the response, `answer_reward` is
1 if it is moreover equal to the truth, and `reward` is what training maximises: `answer_reward` again.
"""

from collections.abc import Callable

from cs336_alignment.grading.equality import answers_equal
from cs336_alignment.grading.extract import extract_answer, extract_boxed

RewardFn = Callable[[str, str], dict[str, float]]


def rewards(has_format: bool, is_correct: bool) -> dict[str, float]:
    """The dictionary of a response; one without an answer cannot be correct."""
    correct = float(has_format and is_correct)
    return {"reward": correct, "format_reward": float(has_format), "answer_reward": correct}


def r1_zero_reward_fn(response: str, ground_truth: str) -> dict[str, float]:
    r"""Reward a response to the R1-Zero prompt: `... </think> <answer> ... </answer>`; see `extract_answer`.

    >>> r1_zero_reward_fn("2 + 2 is 4. </think> <answer> 5 </answer>", "4")
    {'reward': 0.0, 'format_reward': 1.0, 'answer_reward': 0.0}
    """
    answer = extract_answer(response)
    return rewards(answer is not None, answer is not None and answers_equal(answer, ground_truth))


def question_only_reward_fn(response: str, ground_truth: str) -> dict[str, float]:
    r"""Reward a response that states its answer in a `\boxed{...}`; see `extract_boxed`.

    >>> question_only_reward_fn(r"2 + 2 is \boxed{4}.", "4")
    {'reward': 1.0, 'format_reward': 1.0, 'answer_reward': 1.0}
    """
    answer = extract_boxed(response)
    return rewards(answer is not None, answer is not None and answers_equal(answer, ground_truth))


REWARD_FUNCTIONS: dict[str, RewardFn] = {"r1_zero": r1_zero_reward_fn, "question_only": question_only_reward_fn}
"""Those that a command line knows by name."""

EXTRACTORS: dict[RewardFn, Callable[[str], str | None]] = {
    r1_zero_reward_fn: extract_answer,
    question_only_reward_fn: extract_boxed,
}
"""How the functions above find the answer, which is all that tells them apart."""
