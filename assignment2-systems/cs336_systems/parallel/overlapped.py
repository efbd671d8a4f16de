"""Overlapped: an all-reduce starts as soon as its gradients are there, while the backward pass goes on."""

import weakref
from functools import partial
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from cs336_systems.parallel.base import DataParallel
from cs336_systems.parallel.collectives import AllReduceMean, Group, check_same_everywhere, gradient

#: Parameters of one dtype whose gradients travel in one message.
Bucket = list[nn.Parameter]


class OverlappedDataParallel(DataParallel):
    """Each gradient travels as soon as autograd has summed it up.

    Messages leave in one order in all processes, the reverse of the parameters' order, which is about the order of the
    backward pass: a gradient that is early waits for those before it. So processes in which another set of parameters
    gets gradients still send the same messages; what waits for a gradient that never comes leaves at the end.
    """

    def __init__(self, module: nn.Module, group: Group = None) -> None:
        super().__init__(module, group)
        self._buckets = self._fill_buckets()
        check_same_everywhere([f"a bucket of {len(bucket)}" for bucket in self._buckets], "buckets", group)
        this: Any = weakref.proxy(self)  # what such a hook holds is never freed: Python cannot see the cycle
        handles = [
            parameter.register_post_accumulate_grad_hook(partial(type(self)._on_gradient, this, number, place))
            for number, bucket in enumerate(self._buckets)
            for place, parameter in enumerate(bucket)
        ]
        weakref.finalize(self, _remove, handles)  # the module can be trained on without its container
        self._reset()

    def _fill_buckets(self) -> list[Bucket]:
        """The messages, in the order in which they leave."""
        return [[parameter] for parameter in reversed(self.trainable)]

    def _reset(self) -> None:
        self._absent = [set(range(len(bucket))) for bucket in self._buckets]  # gradients still to come
        self._under_way: list[AllReduceMean] = []

    def _on_gradient(self, number: int, place: int, _: nn.Parameter) -> None:
        """The gradient of a bucket's parameter is there."""
        absent = self._absent[number]
        if place not in absent or (self._under_way and not self._synchronizing):
            raise RuntimeError(
                "a second backward pass has begun before finish_gradient_synchronization(); call that between them, "
                "or run all backward passes but the last under no_sync()"
            )
        if not self._synchronizing:
            return
        absent.remove(place)
        if not absent:
            while len(self._under_way) < len(self._buckets) and not self._absent[len(self._under_way)]:
                self._launch_next()

    def _launch_next(self) -> None:
        gradients = [gradient(parameter) for parameter in self._buckets[len(self._under_way)]]
        self._under_way.append(AllReduceMean(gradients, self.group))

    def _synchronize(self) -> None:
        while len(self._under_way) < len(self._buckets):
            self._launch_next()
        for work in self._under_way:
            work.wait()
        self._reset()


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
