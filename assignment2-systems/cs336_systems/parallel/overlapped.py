"""Overlapped: an all-reduce starts as soon as its gradients are there, while the backward pass goes on."""

import weakref
from functools import partial
from typing import Any

from torch import nn

from cs336_systems.parallel.base import DataParallel
from cs336_systems.parallel.collectives import AllReduceMean, Group, Pending, gradient
from cs336_systems.parallel.flat import Bucket


class OverlappedDataParallel(DataParallel):
    """Each gradient travels as soon as autograd has summed it up.

    Messages leave in one order in all processes, the reverse of the parameters' order, which is about the order of the
    backward pass: a gradient that is early waits for those before it. So processes in which another set of parameters
    gets gradients still send the same messages; what waits for a gradient that never comes leaves at the end.
    """

    def __init__(self, module: nn.Module, group: Group = None) -> None:
        super().__init__(module, group)
        self._buckets = self._fill_buckets()
        self._bucket_of = {p: number for number, bucket in enumerate(self._buckets) for p in bucket.parameters}
        this: Any = weakref.proxy(self)  # what such a hook holds is never freed: Python cannot see the cycle
        for parameter in self.trainable:
            parameter.register_post_accumulate_grad_hook(partial(type(self)._on_gradient, this))
        self._reset()

    def _fill_buckets(self) -> list[Bucket]:
        """The messages, in the order in which they leave."""
        return [Bucket([parameter]) for parameter in reversed(self.trainable)]

    def _reset(self) -> None:
        self._absent = [set(bucket.parameters) for bucket in self._buckets]  # whose gradients are still to come
        self._under_way: list[Pending] = []

    def _on_gradient(self, parameter: nn.Parameter) -> None:
        absent = self._absent[self._bucket_of[parameter]]
        if parameter not in absent or (self._under_way and not self._synchronizing):
            raise RuntimeError(
                "a second backward pass has begun before finish_gradient_synchronization(); call that between them, "
                "or run all backward passes but the last under no_sync()"
            )
        if self._synchronizing:
            absent.remove(parameter)
        while len(self._under_way) < len(self._buckets) and not self._absent[len(self._under_way)]:
            self._launch_next()

    def _launch_next(self) -> None:
        bucket = self._buckets[len(self._under_way)]
        self._under_way.append(self._all_reduce(bucket))

    def _all_reduce(self, bucket: Bucket) -> Pending:
        """In place: a single gradient needs no copying."""
        (parameter,) = bucket.parameters
        return AllReduceMean(gradient(parameter), self.group)

    def _synchronize(self) -> None:
        while len(self._under_way) < len(self._buckets):
            self._launch_next()
        for work in self._under_way:
            work.wait()
        self._reset()
