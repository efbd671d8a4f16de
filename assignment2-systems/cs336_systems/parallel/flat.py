"""The flat way: after the backward pass, one all-reduce of all gradients end to end."""

from itertools import groupby

from cs336_systems.parallel.base import DataParallel
from cs336_systems.parallel.collectives import AllReduceMean, flatten, gradient


class FlatDataParallel(DataParallel):
    """All gradients of a dtype travel in one message, which pays the latency once."""

    def _synchronize(self) -> None:
        by_dtype = sorted(self.trainable, key=lambda parameter: str(parameter.dtype))
        for _, group in groupby(by_dtype, key=lambda parameter: parameter.dtype):
            parameters = list(group)
            message = flatten([gradient(parameter) for parameter in parameters])
            AllReduceMean([message], self.group).wait()
            parts = message.split([parameter.numel() for parameter in parameters])
            for parameter, part in zip(parameters, parts, strict=True):
                parameter.grad = part.view(parameter.shape)  # no copy back
