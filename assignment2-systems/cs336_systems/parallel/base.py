"""What all data-parallel containers share: one start, one set of gradients, one end of the backward pass."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cs336_basics.nn_utils import clip_gradient
from cs336_systems.parallel.collectives import AllReduceMean, Group, broadcast, check_same_everywhere, describe


class DataParallel(nn.Module):
    """A module that every process trains on its own rows of the batch, with gradients averaged over processes.

    All processes start from process 0's parameters and buffers. After a backward pass,
    `finish_gradient_synchronization()` leaves in every `.grad` the mean over the processes, so that equal optimizers
    keep the parameters equal. The processes' losses are means over equal numbers of rows; otherwise multiply them by
    `loss_weight`.

    A parameter that got no gradient in this process counts as zeros if it got one elsewhere, and keeps `None` if it
    got none anywhere, as without parallelism. Tied parameters are one parameter. Frozen ones are left alone.

    How and when gradients travel is what the subclasses differ in: they define `_synchronize`, which is called
    when every trainable parameter has a gradient, and may begin earlier.

    Args:
        module: the module, on the device where it trains; it stays reachable as `.module`.
        group: the processes that share the work; None for all.

    Raises:
        ValueError: the processes have different modules.
    """

    def __init__(self, module: nn.Module, group: Group = None) -> None:
        super().__init__()
        self.module = module
        self.group = group
        self.world_size = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        check_same_everywhere(describe(module), "modules", group)
        broadcast([*module.parameters(), *module.buffers()], group=group)
        self.trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self._synchronizing = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward passes in here add to the local gradients only; the next one outside synchronises the sum."""
        before, self._synchronizing = self._synchronizing, False
        try:
            yield
        finally:
            self._synchronizing = before

    def finish_gradient_synchronization(self) -> None:
        """Call after the backward pass: from here on every gradient is the mean over the processes."""
        missing = [parameter for parameter in self.trainable if parameter.grad is None]
        for parameter in missing:
            parameter.grad = torch.zeros_like(parameter)
        if self.trainable:
            self._synchronize()
        self._drop_absent(self.trainable, missing)

    def _drop_absent(self, parameters: list[nn.Parameter], missing: list[nn.Parameter]) -> None:
        """Of parameters that got no gradient here, `missing`, give back `None` to those that got none anywhere."""
        if not parameters:
            return
        number = {parameter: number for number, parameter in enumerate(parameters)} if missing else {}
        present = torch.ones(len(parameters), device=parameters[0].device)
        for parameter in missing:
            present[number[parameter]] = 0
        AllReduceMean([present], self.group).wait()
        for parameter in missing:  # who misses nothing does not look, and so does not wait for the GPU
            if present[number[parameter]] == 0:
                parameter.grad = None

    def clip_gradient(self, max_norm: float) -> Tensor:
        """Scale all gradients, in place, so that their joint L2 norm is at most `max_norm`; returns what it was."""
        return clip_gradient(self.trainable, max_norm)

    def loss_weight(self, rows: int) -> Tensor:
        """What to multiply this process's mean loss by if it has `rows` rows and others may have more or fewer.

        The average of the weighted losses is then the mean over all rows. A process without rows multiplies a loss of
        zero; except with sharded weights, it may also run no pass at all.
        """
        device = next(self.module.parameters()).device
        mean = torch.tensor(float(rows), device=device)
        AllReduceMean([mean], self.group).wait()
        return rows / mean

    def _synchronize(self) -> None:
        """Average the gradients of `trainable`, all of which are there, in the same order in every process."""
        raise NotImplementedError
