"""One update of a policy: gradients accumulated over microbatches, clipped, and a step of the optimizer."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from cs336_alignment.tokenization import token_budget_microbatches

Microbatch = TypeVar("Microbatch")


class DivergedError(FloatingPointError):
    """A loss or a gradient is no number any more; the weights are those of before the update."""


@dataclass(frozen=True)
class OptimizerConfig:
    """How the policy is updated."""

    lr: float = 1e-5
    """Highest learning rate."""
    schedule: Literal["constant", "cosine"] = "constant"
    """What follows the warm-up: the same rate to the end, or half a cosine wave down to 0."""
    warmup_ratio: float = 0.0
    """Share of the updates in which the rate rises to `lr`."""
    algorithm: Literal["adamw", "rmsprop"] = "adamw"
    """AdamW (Loshchilov & Hutter 2019), or RMSprop as in the paper on DPO."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decays of the first and the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this joint L2 norm."""
    gradient_accumulation_steps: int = 128
    """Microbatches that the batch of an update is split into."""
    microbatch_tokens: int | None = None
    """Split by tokens instead: microbatches of rows of similar length, of at most so many tokens with their padding."""

    def __post_init__(self) -> None:
        for name in ("lr", "eps", "weight_decay"):
            if not getattr(self, name) >= 0:  # nor NaN
                raise ValueError(f"{name} is {getattr(self, name)}, but must not be negative")
        if not 0 <= self.warmup_ratio <= 1:
            raise ValueError(f"warmup_ratio is {self.warmup_ratio}, but must be between 0 and 1")
        if not self.max_grad_norm > 0:
            raise ValueError(f"max_grad_norm is {self.max_grad_norm}, but must be positive; inf clips nothing")
        for name in ("gradient_accumulation_steps", "microbatch_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, but must be at least 1")

    def check_batch_size(self, name: str, batch_size: int) -> None:
        """Raise a ValueError unless a batch splits into microbatches of one size, where they are counted."""
        if self.microbatch_tokens is None and batch_size % self.gradient_accumulation_steps:
            raise ValueError(
                f"{name} {batch_size} must be a multiple of gradient_accumulation_steps "
                f"{self.gradient_accumulation_steps}: its microbatches are of one size"
            )

    def microbatches(self, lengths: Sequence[int], batch_size: int) -> list[list[int]]:
        """Split a batch: indices into `lengths`, each once.

        Args:
            lengths: tokens of each row.
            batch_size: rows of a full batch. A batch with fewer has fewer microbatches, and none that is larger.
        """
        if self.microbatch_tokens is not None:
            return token_budget_microbatches(lengths, self.microbatch_tokens)
        size = batch_size // self.gradient_accumulation_steps
        indices = list(range(len(lengths)))
        return [indices[start : start + size] for start in range(0, len(lengths), size)]

    def lr_at(self, step: int, total_steps: int) -> float:
        """The learning rate of update `step`, of 1 to `total_steps`: no update is made with a rate of 0."""
        warmup = math.ceil(self.warmup_ratio * total_steps)
        if step <= warmup:
            return self.lr * step / warmup
        if self.schedule == "constant":
            return self.lr
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - 1 - warmup) / (total_steps - warmup)))


class PolicyOptimizer:
    """Updates a model.

    Attributes:
        optimizer: PyTorch's, with its state.
    """

    def __init__(self, model: nn.Module, config: OptimizerConfig) -> None:
        self.model = model
        self.config = config
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        fused = parameters[0].device.type == "cuda"
        self.optimizer: torch.optim.Optimizer
        if config.algorithm == "adamw":
            self.optimizer = torch.optim.AdamW(
                parameters, config.lr, config.betas, config.eps, config.weight_decay, fused=fused
            )
        else:
            self.optimizer = torch.optim.RMSprop(
                parameters, config.lr, eps=config.eps, weight_decay=config.weight_decay
            )

    def update(
        self,
        microbatches: Iterable[Microbatch],
        train_step: Callable[[Microbatch], tuple[Tensor, Mapping[str, Tensor]]],
        lr: float,
    ) -> dict[str, float]:
        """Update the model once.

        Args:
            microbatches: the parts of the batch.
            train_step: back-propagates the loss of a part. Returns that loss and what else is to be logged, each as
                the part's share of a sum over the batch.
            lr: the learning rate.

        Returns:
            `loss`, `grad_norm` before clipping, `lr`, and the sums of what `train_step` returned.

        Raises:
            DivergedError: the loss or the norm of the gradient is not finite. Nothing was updated.
        """
        sums: dict[str, Tensor] = {}
        for microbatch in microbatches:
            loss, metrics = train_step(microbatch)
            for name, share in {"loss": loss, **metrics}.items():
                sums[name] = sums[name] + share if name in sums else share
        grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        result = {name: value.item() for name, value in {**sums, "grad_norm": grad_norm}.items()}
        finite = math.isfinite(result["loss"]) and math.isfinite(result["grad_norm"])
        if finite:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if not finite:
            raise DivergedError(
                f"the loss is {result['loss']}, the norm of the gradient {result['grad_norm']}, "
                f"the learning rate {lr:.2e}"
            )
        return {**result, "lr": lr}
