"""The naive way: after the backward pass, one all-reduce after the other."""

from cs336_systems.parallel.base import DataParallel
from cs336_systems.parallel.collectives import AllReduceMean, gradient


class NaiveDataParallel(DataParallel):
    """Every gradient travels by itself, and nothing else happens meanwhile."""

    def _synchronize(self) -> None:
        for parameter in self.trainable:
            AllReduceMean([gradient(parameter)], self.group).wait()
