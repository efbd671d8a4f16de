"""What a trainer asks of whatever generates text for it.

Trainers and programs know this protocol only. `vllm_engine` and `transformers_engine` implement it, and both give the
same completions in float32 when they decode greedily.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from torch import Tensor


@dataclass(frozen=True)
class SamplingParams:
    """How completions are drawn; the names are vLLM's."""

    temperature: float = 1.0
    """Logits are divided by it; 0 takes the most probable token (greedy)."""
    top_p: float = 1.0
    """Draw from the smallest set of tokens that has this probability together (Holtzman et al. 2020)."""
    max_tokens: int = 1024
    """The most tokens of a completion."""
    min_tokens: int = 0
    """No stop string, and no end of sequence, before so many tokens."""
    n: int = 1
    """Completions of each prompt."""
    stop: tuple[str, ...] = ()
    """Strings that end a completion; they stay part of it."""
    seed: int | None = None
    """Fixes the draws of one engine; different engines draw differently."""

    def __post_init__(self) -> None:
        if not self.temperature >= 0:  # nor NaN
            raise ValueError(f"temperature is {self.temperature}, but must not be negative; 0 is greedy")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}, but must be above 0 and at most 1")
        if self.max_tokens < 1 or self.n < 1:
            raise ValueError(f"max_tokens {self.max_tokens} and n {self.n} must be at least 1")
        if not 0 <= self.min_tokens <= self.max_tokens:
            raise ValueError(
                f"min_tokens is {self.min_tokens}, but must lie between 0 and max_tokens {self.max_tokens}"
            )


@dataclass(frozen=True)
class Completion:
    """One continuation of one prompt."""

    text: str
    """Without the end-of-sequence token; with the stop string that ended it."""
    token_ids: tuple[int, ...]
    """What the engine generated, a final end-of-sequence token included."""
    log_probs: tuple[float, ...]
    """The engine's log-probability of each of these tokens, before temperature and top-p."""
    finish_reason: Literal["stop", "length"]
    """length: `max_tokens`, or the model's context, cut it short."""


@runtime_checkable
class InferenceEngine(Protocol):
    """Generates completions with the weights that it was last given."""

    def generate(self, prompts: Sequence[str], params: SamplingParams) -> list[list[Completion]]:
        """`params.n` completions for each prompt, in the order of the prompts.

        Raises:
            ValueError: a prompt does not fit into the model's context.
        """
        ...

    def load_policy(self, state_dict: Mapping[str, Tensor]) -> None:
        """Take new weights: those of `policy.state_dict()` of a transformers model of the same architecture.

        Raises:
            ValueError: names or shapes do not fit, and nothing was loaded.
        """
        ...

    def sleep(self) -> None:
        """Give back the memory that generating needs, until `wake`."""
        ...

    def wake(self) -> None:
        """Be ready to generate again, with the weights of before."""
        ...

    def close(self) -> None:
        """Give back everything."""
        ...
