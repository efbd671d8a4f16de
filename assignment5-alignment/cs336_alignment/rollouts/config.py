"""Options of rollouts and of evaluations during training. This module imports no PyTorch, so that `--help` is quick."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from cs336_alignment.policy.config import check_positive
from cs336_alignment.prompts.templates import load_prompt
from cs336_alignment.rollouts.rewards import REWARDS

EngineName = Literal["vllm", "transformers"]


@dataclass(frozen=True)
class SamplingParams:
    """How completions are sampled. The names are vLLM's."""

    temperature: float = 1.0
    """Divide the logits by this; 0 takes the most probable token (greedy decoding)."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens whose probabilities sum to this (Holtzman et al. 2020)."""
    max_tokens: int = 1024
    """Maximum number of tokens in a completion."""
    min_tokens: int = 0
    """Neither a stop string nor an end-of-sequence token ends a completion before this many tokens."""
    n: int = 1
    """Number of completions of each prompt."""
    stop: tuple[str, ...] = ()
    """Strings that end a completion. They stay part of it."""
    seed: int | None = None
    """Seed of the samples. The same seed gives different samples in different engines."""

    def __post_init__(self) -> None:
        if not self.temperature >= 0:  # refuses NaN too
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
class EngineConfig:
    """The engine that generates, and where it runs."""

    engine: EngineName = "vllm"
    """vllm, or transformers, which is always installed."""
    engine_device: str = "auto"
    """Device of the engine. auto: in training the second GPU if there is one, otherwise the policy's device."""
    gpu_memory_utilization: float = 0.85
    """Fraction of the GPU's memory that vLLM uses while it generates."""
    compiled: bool | None = None
    """Generate with compiled code and CUDA graphs: up to a minute to prepare, then several times as fast.
    Default: on a GPU only."""

    def __post_init__(self) -> None:
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ValueError(
                f"gpu_memory_utilization is {self.gpu_memory_utilization}, but must be above 0 and at most 1"
            )


@dataclass(frozen=True)
class RolloutConfig:
    """How responses are sampled and graded."""

    prompt: str = "r1_zero"
    """Template that questions are inserted into: the name of a built-in one, or the path of a file."""
    reward: str | None = "r1_zero"
    """Name of the reward function. None: responses are not graded."""
    stop: tuple[str, ...] | None = None
    """Strings that end a response. They stay part of it. Default: those that belong to the prompt."""
    temperature: float = 1.0
    """Divide the logits by this before sampling; 0 takes the most probable token."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens whose probabilities sum to this."""
    max_tokens: int = 1024
    """Maximum number of tokens in a response."""
    grading_workers: int = 4
    """Number of processes that grade."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """The engine that generates."""

    def __post_init__(self) -> None:
        if self.reward is not None and self.reward not in REWARDS:
            raise ValueError(f"there is no reward {self.reward!r}; choose one of {', '.join(REWARDS)}")
        self.sampling()

    def sampling(self, **changes: Any) -> SamplingParams:
        """Return the sampling parameters, with some of them changed.

        Raises:
            ValueError: there is no such prompt, or a parameter is out of range.
        """
        stop = load_prompt(self.prompt).stop if self.stop is None else self.stop
        return replace(SamplingParams(self.temperature, self.top_p, self.max_tokens, stop=stop), **changes)


@dataclass(frozen=True)
class EvaluationConfig:
    """When and on what the policy is evaluated during training."""

    eval_data: Path | None = Path("data/math/test.jsonl")
    """Questions to evaluate the policy on. None: no evaluation."""
    eval_examples: int | None = 1024
    """Evaluate on a random subset of this many questions, always the same. None: all of them."""
    eval_every: int = 10
    """Evaluate after this many steps. There is also an evaluation before the first step and after the last."""
    eval_temperature: float = 1.0
    """Sampling temperature of evaluations; 0 takes the most probable token."""
    log_examples: int = 8
    """Write this many responses of each evaluation to generations/ as text."""

    def __post_init__(self) -> None:
        check_positive(self, "eval_examples", "eval_every")
        if self.eval_temperature < 0 or self.log_examples < 0:
            raise ValueError(
                f"eval_temperature {self.eval_temperature} and log_examples {self.log_examples} must not be negative"
            )
