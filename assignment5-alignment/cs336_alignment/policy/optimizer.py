"""The optimizer of a policy: gradients accumulated over microbatches, clipped, checked, and one optimizer step."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from cs336_alignment.policy.config import OptimizerConfig
from cs336_alignment.tensors.tokenization import token_budget_microbatches


class DivergedError(FloatingPointError):
    """The loss or the gradient became NaN or infinite. The weights are those before the update."""


class AccumulatedGradients:
    """The gradients of one update while its microbatches are added up, and the metrics of that update.

    Attributes:
        metrics: empty until the update is done; then `loss`, `grad_norm` before clipping, `lr`, and the sum over the
            microbatches of everything that was passed to `backward`.
    """

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}
        self.sums: dict[str, Tensor] = {}

    def backward(self, loss: Tensor, **shares: Tensor) -> None:
        """Back-propagate the loss of a microbatch.

        Args:
            loss: the microbatch's share of the batch's loss, so that the shares add up to it.
            shares: what else to log, also as shares of a sum over the batch.
        """
        loss.backward()
        for name, share in {"loss": loss.detach(), **shares}.items():
            self.sums[name] = self.sums[name] + share if name in self.sums else share


class PolicyOptimizer:
    """Updates a model.

    Attributes:
        optimizer: PyTorch's optimizer, with its state.
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
        elif config.algorithm == "rmsprop":
            self.optimizer = torch.optim.RMSprop(
                parameters, config.lr, eps=config.eps, weight_decay=config.weight_decay
            )
        else:
            raise ValueError(f"there is no algorithm {config.algorithm!r}; choose adamw or rmsprop")

    @contextmanager
    def accumulate(self, lr: float) -> Iterator[AccumulatedGradients]:
        """Update the model once, with the gradients that are accumulated inside the `with` block.

        Args:
            lr: the learning rate of this update.

        Raises:
            DivergedError: the loss or the gradient norm is not finite. Nothing was updated.
        """
        gradients = AccumulatedGradients()
        yield gradients
        grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        result = {name: value.item() for name, value in {**gradients.sums, "grad_norm": grad_norm}.items()}
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
        gradients.metrics = {**result, "lr": lr}


def split_into_microbatches(lengths: Sequence[int], config: OptimizerConfig, full_batch_size: int) -> list[list[int]]:
    """Split a batch into microbatches: lists of indices into `lengths`, in which each index occurs once.

    Args:
        lengths: tokens of each sequence of the batch.
        full_batch_size: sequences in a full batch. A shorter batch has fewer microbatches, none of them larger.
    """
    if config.microbatch_tokens is not None:
        return token_budget_microbatches(lengths, config.microbatch_tokens)
    size = full_batch_size // config.gradient_accumulation_steps
    indices = list(range(len(lengths)))
    return [indices[start : start + size] for start in range(0, len(lengths), size)]
