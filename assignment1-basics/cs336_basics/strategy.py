"""Decide where and how a training step runs: the seam between the training loop and parallelism.

The loop in `cs336_basics.training` knows only the protocol `Strategy`. This package has one strategy, `SingleDevice`;
data-parallel ones can take its place without a change to the loop.
"""

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from cs336_basics.checkpoint import read_checkpoint, restore, save_checkpoint
from cs336_basics.machine import check_driver
from cs336_basics.nn_utils import clip_gradient
from cs336_basics.optimizer import parameters_for


@runtime_checkable
class Strategy(Protocol):
    """What the training loop needs from its surroundings. Each process is a rank, 0 to `world_size` - 1."""

    device: torch.device
    rank: int
    world_size: int

    def wrap_model(self, model: nn.Module) -> nn.Module:
        """Put the model where it trains. The result is called like the model."""
        ...

    def build_optimizer(
        self, model: nn.Module, optimizer_class: type[torch.optim.Optimizer], **options: Any
    ) -> torch.optim.Optimizer:
        """Build an optimizer for the parameters of the wrapped model."""
        ...

    def accumulate(self, model: nn.Module, *, last: bool) -> AbstractContextManager[None]:
        """Surround the forward and backward pass of a microbatch. Gradients need to be complete only after the last."""
        ...

    def step(self, model: nn.Module, optimizer: torch.optim.Optimizer, max_grad_norm: float) -> Tensor:
        """Clip the gradients, update the weights and clear the gradients, without waiting for the GPU.

        Returns:
            The gradient norm before clipping.
        """
        ...

    def reduce_mean(self, value: Tensor) -> Tensor:
        """Return the mean of `value` over all ranks."""
        ...

    def save(
        self, path: os.PathLike[str], model: nn.Module, optimizer: torch.optim.Optimizer, iteration: int, **extra: Any
    ) -> None:
        """Write a checkpoint, a file or a folder that appears only when it is complete. All ranks call this."""
        ...

    def load(self, path: os.PathLike[str], model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Restore a checkpoint, and return its iteration and its extra values."""
        ...


class SingleDevice:
    """Train on one CPU or one GPU.

    Args:
        device: "cpu", "cuda", "cuda:1", "mps", or "auto" for a GPU if there is one.
    """

    rank = 0
    world_size = 1

    def __init__(self, device: str = "auto") -> None:
        self.device = resolve_device(device)

    def wrap_model(self, model: nn.Module) -> nn.Module:
        return model.to(self.device)

    def build_optimizer(
        self, model: nn.Module, optimizer_class: type[torch.optim.Optimizer], **options: Any
    ) -> torch.optim.Optimizer:
        return optimizer_class(parameters_for(optimizer_class, model), **options)

    def accumulate(self, model: nn.Module, *, last: bool) -> AbstractContextManager[None]:
        return nullcontext()

    def step(self, model: nn.Module, optimizer: torch.optim.Optimizer, max_grad_norm: float) -> Tensor:
        norm = clip_gradient(model.parameters(), max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm

    def reduce_mean(self, value: Tensor) -> Tensor:
        return value

    def save(
        self, path: os.PathLike[str], model: nn.Module, optimizer: torch.optim.Optimizer, iteration: int, **extra: Any
    ) -> None:
        save_checkpoint(model, optimizer, iteration, path, **extra)

    def load(self, path: os.PathLike[str], model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return restore(read_checkpoint(path), model, optimizer, path)


def resolve_device(name: str) -> torch.device:
    """Return the device with this name; "auto" is the GPU if there is one.

    Raises:
        ValueError: this machine has no such device, or its NVIDIA driver is too old for this PyTorch.
    """
    if name.startswith(("auto", "cuda")):
        check_driver(torch.version.cuda)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {name!r} cannot be used here ({reason}); choose auto or cpu") from error
    return device
