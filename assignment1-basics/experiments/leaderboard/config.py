"""Options that the leaderboard's ladder tried and no preset uses: they are kept here so that the ladder is repeatable.

`experiments.leaderboard.model` implements them. Importing this module does not import PyTorch.
"""

from dataclasses import dataclass, field, fields

from cs336_basics.model_config import ModelConfig
from cs336_basics.train_config import TrainConfig


@dataclass(frozen=True)
class LeaderboardModelConfig(ModelConfig):
    """A model with a soft cap or value embeddings."""

    logit_softcap: float | None = None
    """Bound of the logits, which a tanh bends towards it (Gemma Team 2024). Default: no bound."""
    value_embeddings: int = 0
    """In this many of the last blocks, each token adds a learned vector of its own to its values. The tables start at
    zero (Jordan et al. 2024, "modded-nanogpt"; the idea is from Zhou et al. 2024, "Value residual learning")."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.value_embeddings <= self.num_layers:
            raise ValueError(f"value_embeddings is {self.value_embeddings}, but there are {self.num_layers} blocks")
        if self.logit_softcap is not None and self.logit_softcap <= 0:
            raise ValueError(f"logit_softcap is {self.logit_softcap}, but must be positive, or None for no bound")


@dataclass(frozen=True)
class LeaderboardConfig(TrainConfig):
    """A run whose batches and contexts may grow."""

    model: ModelConfig = field(default_factory=LeaderboardModelConfig)
    """Shape of the model."""
    start_batch_size: int | None = None
    """Sequences per step at the start, doubled at even intervals up to batch_size. Default: no growth."""
    start_context: int | None = None
    """Tokens per sequence at the start, doubled at even intervals up to the model's context length. There are more of
    the shorter sequences, so that a step keeps its number of tokens. Default: no growth."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.start_batch_size or 0) % self.microbatches:
            raise ValueError(
                f"start_batch_size {self.start_batch_size} does not split into {self.microbatches} equal microbatches"
            )
        for name, first, last in (
            ("start_batch_size", self.start_batch_size, self.batch_size),
            ("start_context", self.start_context, self.model.context_length),
        ):
            if first is not None and (first < 1 or last % first or (last // first).bit_count() != 1):
                raise ValueError(f"{name} is {first}, but must be {last} divided by a power of two")

    @classmethod
    def of(cls, config: TrainConfig) -> "LeaderboardConfig":
        """Add the leaderboard's options, all switched off, to a configuration."""
        values = {item.name: getattr(config, item.name) for item in fields(TrainConfig)}
        model = {item.name: getattr(config.model, item.name) for item in fields(ModelConfig)}
        return cls(**values | {"model": LeaderboardModelConfig(**model)})

    def batch_shape(self, step: int) -> tuple[int, int]:
        """Return the number of sequences of a step, 1 to `steps`, and of tokens in each."""
        batch_size = _grown(self.start_batch_size, self.batch_size, step, self.steps)
        context = _grown(self.start_context, self.model.context_length, step, self.steps)
        return batch_size * self.model.context_length // context, context


def _grown(first: int | None, last: int, step: int, steps: int) -> int:
    """Return a number that grows from `first` to `last` by doublings that divide `steps` evenly."""
    if first is None:
        return last
    stages = (last // first).bit_length()
    return first << ((min(step, steps) - 1) * stages // steps)
