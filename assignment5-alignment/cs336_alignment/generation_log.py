"""Graded generations: what was asked, what a model answered, what that is worth; as numbers and as text to read."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from cs336_alignment.engines.base import Completion
from cs336_alignment.example import Example
from cs336_alignment.policy import Policy, TokenRow
from cs336_alignment.run_log import write_atomically


@dataclass(frozen=True)
class Generation:
    """A response to an example, graded."""

    example: Example
    prompt: str
    """What the model was given: the question in its template."""
    completion: Completion
    rewards: dict[str, float]
    """What the reward function returned. Empty where there is no answer to compare with."""

    @property
    def correct(self) -> bool:
        """Whether it got the full reward."""
        return self.rewards.get("reward", 0.0) >= 1

    def row(self, policy: Policy) -> TokenRow:
        """The prompt's tokens and those that the engine generated."""
        return TokenRow(tuple(policy.tokenizer(self.prompt)["input_ids"]), self.completion.token_ids)

    def as_json(self) -> dict[str, Any]:
        """The generation as plain data."""
        return {
            "id": self.example.id,
            "prompt": self.prompt,
            "response": self.completion.text,
            "ground_truth": self.example.answer,
            **self.rewards,
            "response_length": len(self.completion.token_ids),
            "finish_reason": self.completion.finish_reason,
        }


def summarize(generations: Sequence[Generation]) -> dict[str, float]:
    """Means over generations.

    Returns:
        The mean of each reward; `response_length` in tokens, also of the correct and of the incorrect ones, if there
        are such; and `unfinished`, the share of responses that were cut short.
    """
    lengths = {
        "response_length": [len(each.completion.token_ids) for each in generations],
        "response_length_correct": [len(each.completion.token_ids) for each in generations if each.correct],
        "response_length_incorrect": [
            len(each.completion.token_ids) for each in generations if each.rewards and not each.correct
        ],
    }
    rewards = {name: [each.rewards[name] for each in generations] for name in generations[0].rewards}
    unfinished = {"unfinished": [float(each.completion.finish_reason == "length") for each in generations]}
    return {name: fmean(values) for name, values in (rewards | lengths | unfinished).items() if values}


def log_generations(path: Path, generations: Sequence[Generation], metrics: dict[str, float], policy: Policy) -> None:
    """Write generations as text to read.

    Args:
        generations: those to show.
        metrics: of all that they are from, for the head of the file.
        policy: the model that they are from, for the mean entropy of its predictions along each response.
    """
    head = "\n".join(f"{name}: {value:.4g}" for name, value in metrics.items())
    write_atomically(path, "\n\n".join([head, *(_as_text(each, policy) for each in generations)]) + "\n")


def _as_text(generation: Generation, policy: Policy) -> str:
    completion = generation.completion
    facts = {
        **{name: f"{value:g}" for name, value in generation.rewards.items()},
        "tokens": str(len(completion.token_ids)) + (" (cut short)" if completion.finish_reason == "length" else ""),
        "mean token entropy": _mean_entropy(generation, policy),
    }
    return (
        f"{'=' * 100}\n{generation.prompt}\n{'-' * 40} response\n{completion.text}\n{'-' * 40}\n"
        f"truth: {generation.example.answer}\n" + "\n".join(f"{name}: {value}" for name, value in facts.items())
    )


def _mean_entropy(generation: Generation, policy: Policy) -> str:
    if not generation.completion.token_ids:
        return "none: the response is empty"
    return f"{policy.mean_entropy(generation.row(policy)):.4f}"
