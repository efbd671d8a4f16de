"""Options of the policy and of its optimizer. This module imports no PyTorch, so that `--help` is quick."""

import math
from dataclasses import dataclass
from typing import Literal

Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class OptimizerConfig:
    """How the policy is updated."""

    lr: float = 1e-5
    """Peak learning rate."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate after the warm-up: constant, or a cosine decay to 0."""
    warmup_ratio: float = 0.0
    """Fraction of the updates over which the learning rate rises linearly to `lr`."""
    algorithm: Literal["adamw", "rmsprop"] = "adamw"
    """AdamW (Loshchilov & Hutter 2019), or RMSprop as in the DPO paper."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the first and second moment."""
    eps: float = 1e-8
    """Added to the square root of the second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Clip the gradients of all parameters together to this L2 norm."""
    gradient_accumulation_steps: int = 128
    """Number of microbatches that the batch of an update is split into."""
    microbatch_tokens: int | None = None
    """Split by tokens instead: at most this many per microbatch, with padding, in sequences of similar length."""

    def __post_init__(self) -> None:
        for name in ("lr", "eps", "weight_decay"):
            if not getattr(self, name) >= 0:  # refuses NaN too
                raise ValueError(f"{name} is {getattr(self, name)}, but must not be negative")
        if not 0 <= self.warmup_ratio <= 1:
            raise ValueError(f"warmup_ratio is {self.warmup_ratio}, but must be between 0 and 1")
        if not self.max_grad_norm > 0:
            raise ValueError(f"max_grad_norm is {self.max_grad_norm}, but must be positive; inf turns clipping off")
        check_positive(self, "gradient_accumulation_steps", "microbatch_tokens")

    def check_batch_size(self, name: str, batch_size: int) -> None:
        """Raise a ValueError if `gradient_accumulation_steps` does not split a batch into equal microbatches."""
        if self.microbatch_tokens is None and batch_size % self.gradient_accumulation_steps:
            raise ValueError(
                f"{name} {batch_size} must be a multiple of gradient_accumulation_steps "
                f"{self.gradient_accumulation_steps}, because all microbatches have the same size"
            )

    def lr_at(self, update: int, total_updates: int) -> float:
        """Compute the learning rate of an update, numbered from 1 to `total_updates`. It is never 0."""
        warmup = math.ceil(self.warmup_ratio * total_updates)
        if update <= warmup:
            return self.lr * update / warmup
        if self.schedule == "constant":
            return self.lr
        return self.lr * 0.5 * (1 + math.cos(math.pi * (update - 1 - warmup) / (total_updates - warmup)))


def check_positive(config: object, *names: str) -> None:
    """Raise a ValueError for the first of these fields that is below 1. Fields that are None are skipped."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}, but must be at least 1")
