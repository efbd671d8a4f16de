"""Rollouts: what a model was asked, what it responded, and how that was graded; as numbers and as text to read."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from cs336_alignment.datasets.example import Example
from cs336_alignment.policy.policy import Policy, TokenizedExample
from cs336_alignment.rollouts.engines.base import Completion
from cs336_alignment.run_folder import write_atomically


@dataclass(frozen=True)
class Rollout:
    """A graded response to an example."""

    example: Example
    prompt: str
    """The text that the model was given: the question in its template."""
    completion: Completion
    rewards: dict[str, float]
    """The dictionary from the reward function. Empty if there is no answer to compare with."""

    @property
    def correct(self) -> bool:
        """Whether the response received the full reward."""
        return self.rewards.get("reward", 0.0) >= 1

    def tokenize(self, policy: Policy) -> TokenizedExample:
        """Return the tokens of the prompt, and the response's tokens exactly as the engine sampled them."""
        return TokenizedExample(tuple(policy.tokenizer(self.prompt)["input_ids"]), self.completion.token_ids)

    def as_json(self) -> dict[str, Any]:
        """Return the rollout as plain data for JSON."""
        return {
            "id": self.example.id,
            "prompt": self.prompt,
            "response": self.completion.text,
            "ground_truth": self.example.answer,
            **self.rewards,
            "response_length": len(self.completion.token_ids),
            "finish_reason": self.completion.finish_reason,
        }


def summarize(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Compute means over rollouts.

    Returns:
        The mean of each reward; `response_length` in tokens, over all responses and, where there are any, over the
        correct and over the incorrect ones; and `unfinished`, the fraction of responses that were cut short.
    """
    lengths = {
        "response_length": [len(each.completion.token_ids) for each in rollouts],
        "response_length_correct": [len(each.completion.token_ids) for each in rollouts if each.correct],
        "response_length_incorrect": [
            len(each.completion.token_ids) for each in rollouts if each.rewards and not each.correct
        ],
    }
    rewards = {name: [each.rewards[name] for each in rollouts] for name in rollouts[0].rewards}
    unfinished = {"unfinished": [float(each.completion.finish_reason == "length") for each in rollouts]}
    return {name: fmean(values) for name, values in (rewards | lengths | unfinished).items() if values}


def log_generations(path: Path, rollouts: Sequence[Rollout], metrics: dict[str, float], policy: Policy) -> None:
    """Write rollouts as text to read.

    Args:
        rollouts: those to show.
        metrics: of all rollouts that these were chosen from, for the head of the file.
        policy: the model that generated them, for the mean entropy of its predictions along each response.
    """
    head = "\n".join(f"{name}: {value:.4g}" for name, value in metrics.items())
    write_atomically(path, "\n\n".join([head, *(_as_text(each, policy) for each in rollouts)]) + "\n")


def _as_text(rollout: Rollout, policy: Policy) -> str:
    completion = rollout.completion
    facts = {
        **{name: f"{value:g}" for name, value in rollout.rewards.items()},
        "tokens": str(len(completion.token_ids)) + (" (cut short)" if completion.finish_reason == "length" else ""),
        "mean token entropy": _mean_entropy(rollout, policy),
    }
    return (
        f"{'=' * 100}\n{rollout.prompt}\n{'-' * 40} response\n{completion.text}\n{'-' * 40}\n"
        f"truth: {rollout.example.answer}\n" + "\n".join(f"{name}: {value}" for name, value in facts.items())
    )


def _mean_entropy(rollout: Rollout, policy: Policy) -> str:
    if not rollout.completion.token_ids:
        return "none: the response is empty"
    return f"{policy.mean_entropy(rollout.tokenize(policy)):.4f}"
