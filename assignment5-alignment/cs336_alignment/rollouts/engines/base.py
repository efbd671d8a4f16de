"""The protocol of engines, which generate text for programs.

Programs depend on this protocol only. `vllm_engine` and `transformers_engine` implement it, and in float32 both decode
greedily to the same completions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from torch import Tensor

from cs336_alignment.rollouts.config import SamplingParams


@dataclass(frozen=True)
class Completion:
    """One continuation of one prompt."""

    text: str
    """Without the end-of-sequence token; with the stop string that ended it."""
    token_ids: tuple[int, ...]
    """The generated tokens, including a final end-of-sequence token."""
    log_probs: tuple[float, ...]
    """The engine's log-probability of each of these tokens, before temperature and top-p."""
    finish_reason: Literal["stop", "length"]
    """length: it was cut short at `max_tokens` or at the end of the model's context."""


@runtime_checkable
class InferenceEngine(Protocol):
    """Generates completions with the weights that it was given last."""

    def generate(self, prompts: Sequence[str], params: SamplingParams) -> list[list[Completion]]:
        """Generate `params.n` completions of each prompt, in the order of the prompts.

        Raises:
            ValueError: a prompt does not fit into the model's context.
        """
        ...

    def load_weights(self, state_dict: Mapping[str, Tensor]) -> None:
        """Load new weights: the `state_dict()` of a transformers model of the same architecture.

        Raises:
            ValueError: names or shapes do not match; nothing was loaded.
        """
        ...

    def sleep(self) -> None:
        """Release the memory that generation needs, until `wake`."""
        ...

    def wake(self) -> None:
        """Get ready to generate again, with the same weights as before `sleep`."""
        ...

    def close(self) -> None:
        """Release everything. The engine cannot be used afterwards."""
        ...
