"""The flat way: after the backward pass, one all-reduce of all gradients end to end."""

from itertools import groupby

from torch import nn

from cs336_systems.parallel.base import DataParallel
from cs336_systems.parallel.collectives import AllReduceMean, Group, flatten, gradient


class FlatDataParallel(DataParallel):
    """All gradients of a dtype travel in one message, which pays the latency once."""

    def _synchronize(self) -> None:
        by_dtype = sorted(self.trainable, key=lambda parameter: str(parameter.dtype))
        for _, parameters in groupby(by_dtype, key=lambda parameter: parameter.dtype):
            Bucket(list(parameters)).all_reduce(self.group).wait()


class Bucket:
    """Parameters of one dtype whose gradients travel in one message."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters

    def all_reduce(self, group: Group) -> AllReduceMean:
        """Lay the gradients end to end, and begin. The parameters' gradients are parts of the message from now on.

        A single gradient is the message itself, without a copy.
        """
        if len(self.parameters) == 1:
            return AllReduceMean(gradient(self.parameters[0]), group)
        message = flatten([gradient(parameter) for parameter in self.parameters])
        parts = message.split([parameter.numel() for parameter in self.parameters])
        for parameter, part in zip(self.parameters, parts, strict=True):
            parameter.grad = part.view(parameter.shape)
        return AllReduceMean(message, group)
