r"""All reward functions, by name: a response and the true answer in, a dictionary of floats out.

The keys are the course's. `format_reward` is 1 if an answer can be found in the response. `answer_reward` is 1 if that
answer is also equal to the truth. `reward` is what training maximizes, and is the same as `answer_reward`.

To add a reward, write a function `(response, ground_truth) -> dict` at the top level of a module and add it to
`REWARDS`; every `--reward` option then knows its name. A function that may be slow belongs into worker processes: see
`grader.Grader`.
"""

from collections.abc import Callable

from cs336_alignment.datasets.parsing import parse_gsm8k_response, parse_mmlu_response
from cs336_alignment.grading.equality import answers_equal
from cs336_alignment.grading.extract import extract_answer, extract_boxed

RewardFn = Callable[[str, str], dict[str, float]]


def reward_dict(has_format: bool, is_correct: bool) -> dict[str, float]:
    """Make the dictionary for a response. A response without an answer cannot be correct."""
    correct = float(has_format and is_correct)
    return {"reward": correct, "format_reward": float(has_format), "answer_reward": correct}


def r1_zero_reward_fn(response: str, ground_truth: str) -> dict[str, float]:
    r"""Reward a response to the R1-Zero prompt: `... </think> <answer> ... </answer>`; see `extract_answer`.

    >>> r1_zero_reward_fn("2 + 2 is 4. </think> <answer> 5 </answer>", "4")
    {'reward': 0.0, 'format_reward': 1.0, 'answer_reward': 0.0}
    """
    answer = extract_answer(response)
    return reward_dict(answer is not None, answer is not None and answers_equal(answer, ground_truth))


def question_only_reward_fn(response: str, ground_truth: str) -> dict[str, float]:
    r"""Reward a response that states its answer in a `\boxed{...}`; see `extract_boxed`.

    >>> question_only_reward_fn(r"2 + 2 is \boxed{4}.", "4")
    {'reward': 1.0, 'format_reward': 1.0, 'answer_reward': 1.0}
    """
    answer = extract_boxed(response)
    return reward_dict(answer is not None, answer is not None and answers_equal(answer, ground_truth))


def mmlu_reward_fn(response: str, ground_truth: str) -> dict[str, float]:
    """Reward the letter that a response chooses. The format is right if it chooses exactly one."""
    letter = parse_mmlu_response({}, response)
    return reward_dict(letter is not None, letter == ground_truth)


def gsm8k_reward_fn(response: str, ground_truth: str) -> dict[str, float]:
    """Reward the last number in a response. The format is right if there is one."""
    number = parse_gsm8k_response(response)
    return reward_dict(number is not None, number is not None and _same_number(number, ground_truth))


def _same_number(number: str, truth: str) -> bool:
    try:
        return float(number) == float(truth)
    except ValueError:  # the truth is not a number
        return False


#: Reward functions of mathematics, which compare formulas.
MATH_REWARDS: dict[str, RewardFn] = {"r1_zero": r1_zero_reward_fn, "question_only": question_only_reward_fn}

#: All reward functions that `--reward` can name.
REWARDS: dict[str, RewardFn] = {**MATH_REWARDS, "mmlu": mmlu_reward_fn, "gsm8k": gsm8k_reward_fn}

#: How the functions in `MATH_REWARDS` find the answer in a response, which is the only difference between them.
EXTRACTORS: dict[RewardFn, Callable[[str], str | None]] = {
    r1_zero_reward_fn: extract_answer,
    question_only_reward_fn: extract_boxed,
}
