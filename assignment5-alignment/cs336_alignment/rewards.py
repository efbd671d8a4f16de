"""All reward functions by name: those of mathematics, and those of benchmarks that have a parser of their own."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from cs336_alignment.datasets import parse_gsm8k_response, parse_mmlu_response
from cs336_alignment.grading import REWARD_FUNCTIONS, Grader, RewardFn
from cs336_alignment.grading.rewards import rewards


def mmlu_reward_fn(response: str, ground_truth: str) -> dict[str, float]:
    """Reward the letter that a response chooses; its format is right if it chooses one."""
    letter = parse_mmlu_response({}, response)
    return rewards(letter is not None, letter == ground_truth)


def gsm8k_reward_fn(response: str, ground_truth: str) -> dict[str, float]:
    """Reward the last number of a response; its format is right if it has one."""
    number = parse_gsm8k_response(response)
    return rewards(number is not None, number is not None and _same_number(number, ground_truth))


def _same_number(number: str, truth: str) -> bool:
    try:
        return float(number) == float(truth)
    except ValueError:  # the truth is no number
        return False


#: What configurations may name.
REWARDS: dict[str, RewardFn] = {**REWARD_FUNCTIONS, "mmlu": mmlu_reward_fn, "gsm8k": gsm8k_reward_fn}

#: Rewards of responses, in their order, from the responses and the true answers.
Grade = Callable[[Sequence[str], Sequence[str]], list[dict[str, float]]]


@contextmanager
def open_grader(name: str, workers: int) -> Iterator[Grade]:
    """Make a reward function grade many responses at once.

    Comparing formulas may take any time and is left to a `Grader`, in processes of its own. Parsers take microseconds.
    """
    if name in REWARD_FUNCTIONS:
        with Grader(name, workers) as grader:
            yield grader.grade
    else:
        function = REWARDS[name]
        yield lambda responses, truths: [function(*pair) for pair in zip(responses, truths, strict=True)]
