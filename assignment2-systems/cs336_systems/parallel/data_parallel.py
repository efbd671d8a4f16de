"""Data parallelism: what all containers share, and the two that wait for the backward pass to end."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cs336_basics.nn_utils import clip_gradient
from cs336_systems.parallel.collectives import (
    AllReduceMean,
    Group,
    broadcast,
    check_same_on_all_ranks,
    describe,
    flatten,
    gradient,
)


class DataParallel(nn.Module):
    """A module that every rank trains on its own sequences of the batch, with gradients averaged over ranks.

    All ranks start from rank 0's parameters and buffers. After a backward pass, `finish_gradient_synchronization()`
    leaves the mean over the ranks in every `.grad`, so that equal optimizers keep the parameters equal. Each rank's
    loss is a mean over equally many sequences; otherwise multiply it by `loss_weight`.

    A parameter without a gradient on this rank counts as zeros if it got a gradient on another rank. It keeps `None` if
    no rank has a gradient for it, as without parallelism. Tied parameters are one parameter. Frozen parameters are left
    alone.

    Subclasses differ in how and when gradients are sent. They define `_synchronize`, which is called when every
    trainable parameter has a gradient; they may begin earlier.

    Args:
        module: the module, on the device where it trains; it stays reachable as `.module`.
        group: the ranks that share the work; None for all.

    Raises:
        ValueError: the ranks have different modules.
    """

    def __init__(self, module: nn.Module, group: Group = None) -> None:
        super().__init__()
        self.module = module
        self.group = group
        self.world_size = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        check_same_on_all_ranks(describe(module), "modules", group)
        broadcast([*module.parameters(), *module.buffers()], group=group)
        self.trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self._synchronizing = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Accumulate local gradients only; the first backward pass outside this context synchronizes their sum."""
        before, self._synchronizing = self._synchronizing, False
        try:
            yield
        finally:
            self._synchronizing = before

    def finish_gradient_synchronization(self) -> None:
        """Make every gradient the mean over the ranks. Call this after the backward pass."""
        missing = [parameter for parameter in self.trainable if parameter.grad is None]
        for parameter in missing:
            parameter.grad = torch.zeros_like(parameter)
        if self.trainable:
            self._synchronize()
        self._drop_absent(self.trainable, missing)

    def _drop_absent(self, parameters: list[nn.Parameter], missing: list[nn.Parameter]) -> None:
        """Set the gradients in `missing`, which are absent on this rank, to `None` if they are absent on every rank."""
        if not parameters:
            return
        number = {parameter: number for number, parameter in enumerate(parameters)} if missing else {}
        present = torch.ones(len(parameters), device=parameters[0].device)
        for parameter in missing:
            present[number[parameter]] = 0
        AllReduceMean([present], self.group).wait()
        for parameter in missing:  # a rank with no missing gradients skips the check, which would wait for the GPU
            if present[number[parameter]] == 0:
                parameter.grad = None

    def clip_gradient(self, max_norm: float) -> Tensor:
        """Scale all gradients, in place, so that their joint L2 norm is at most `max_norm`; return the norm before."""
        return clip_gradient(self.trainable, max_norm)

    def loss_weight(self, sequences: int) -> Tensor:
        """The factor for this rank's mean loss over `sequences` sequences, if other ranks may have more or fewer.

        The average of the weighted losses is then the mean over all sequences. A rank without sequences multiplies a
        loss of zero; except with sharded weights, it may also skip the forward and backward pass.
        """
        device = next(self.module.parameters()).device
        mean = torch.tensor(float(sequences), device=device)
        AllReduceMean([mean], self.group).wait()
        return sequences / mean

    def _synchronize(self) -> None:
        """Average the gradients of `trainable`, which all exist, in the same order on every rank."""
        raise NotImplementedError


class NaiveDataParallel(DataParallel):
    """One all-reduce per gradient, each finished before the next begins, after the backward pass."""

    def _synchronize(self) -> None:
        for parameter in self.trainable:
            AllReduceMean([gradient(parameter)], self.group).wait()


class FlatDataParallel(DataParallel):
    """One all-reduce for all gradients of a dtype, end to end, after the backward pass: the latency is paid once."""

    def _synchronize(self) -> None:
        by_dtype = sorted(self.trainable, key=lambda parameter: str(parameter.dtype))
        for _, group in groupby(by_dtype, key=lambda parameter: parameter.dtype):
            parameters = list(group)
            message = flatten([gradient(parameter) for parameter in parameters])
            AllReduceMean([message], self.group).wait()
            parts = message.split([parameter.numel() for parameter in parameters])
            for parameter, part in zip(parameters, parts, strict=True):
                parameter.grad = part.view(parameter.shape)  # no copy back
