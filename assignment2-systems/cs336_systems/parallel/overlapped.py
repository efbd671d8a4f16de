"""Data parallelism that overlaps: an all-reduce starts as soon as its gradients exist, during the backward pass."""

import weakref
from functools import partial
from typing import Any, Literal

from torch import nn
from torch.utils.hooks import RemovableHandle

from cs336_systems.parallel.collectives import AllReduceMean, Group, check_same_on_all_ranks, gradient
from cs336_systems.parallel.data_parallel import DataParallel
from cs336_systems.theory.units import MIB

#: Parameters of one dtype whose gradients are sent in one message.
Bucket = list[nn.Parameter]
#: Where no bucket size is given: the fraction of the remaining gradients that makes a bucket, and its least size.
BUCKET_FRACTION, MIN_BUCKET_MIB = 1 / 4, 25


class OverlappedDataParallel(DataParallel):
    """One all-reduce per gradient, started as soon as autograd has accumulated it.

    Messages leave in the same order on all ranks, the reverse of the parameters' order, which is about the order of
    the backward pass: a gradient that arrives early waits for those before it. So ranks on which different parameters
    get gradients still send the same messages; what waits for a gradient that never comes leaves at the end.
    """

    def __init__(self, module: nn.Module, group: Group = None) -> None:
        super().__init__(module, group)
        self._buckets = self._fill_buckets()
        check_same_on_all_ranks([f"a bucket of {len(bucket)}" for bucket in self._buckets], "buckets", group)
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
        """Note a gradient of a bucket, and send every bucket that is complete and next in order."""
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
                self._all_reduce_next_bucket()

    def _all_reduce_next_bucket(self) -> None:
        gradients = [gradient(parameter) for parameter in self._buckets[len(self._under_way)]]
        self._under_way.append(AllReduceMean(gradients, self.group))

    def _synchronize(self) -> None:
        while len(self._under_way) < len(self._buckets):
            self._all_reduce_next_bucket()
        for work in self._under_way:
            work.wait()
        self._reset()


class BucketedDataParallel(OverlappedDataParallel):
    """One all-reduce per bucket of gradients, filled in reverse order of the parameters (Li et al. 2020, sec. 3.2.2).

    Buckets of one size are a compromise: a message costs the host 0.1 to 0.2 ms, so they should be large; but nothing
    hides the last one, so it should be small. Without a given size, buckets shrink: each takes a fixed fraction of the
    gradients that are still to come. A large bucket is then sent while a long backward pass is still ahead, and only a
    small one when it is over. There are few of them: their number grows with the logarithm of the model's size.

    Args:
        module, group: see `DataParallel`.
        bucket_size_mib: a bucket holds at most this many MiB of gradients, unless a single one is larger. None: all
            gradients of a dtype that follow one another in one bucket. "auto": buckets shrink.
    """

    def __init__(
        self, module: nn.Module, bucket_size_mib: float | Literal["auto"] | None = "auto", group: Group = None
    ) -> None:
        if isinstance(bucket_size_mib, int | float) and bucket_size_mib <= 0:
            raise ValueError(f"bucket_size_mib is {bucket_size_mib}, but must be positive, or None for one bucket")
        self._bucket_size_mib = bucket_size_mib
        super().__init__(module, group)

    def _fill_buckets(self) -> list[Bucket]:
        return fill_buckets(self.trainable, self._bucket_size_mib)


def fill_buckets(parameters: list[nn.Parameter], size_mib: float | Literal["auto"] | None) -> list[Bucket]:
    """Put parameters, in reverse order, into buckets of this size; see `BucketedDataParallel`."""
    to_come = sum(parameter.nbytes for parameter in parameters)
    buckets: list[Bucket] = []
    size = limit = 0.0
    for parameter in reversed(parameters):
        same_dtype = buckets and buckets[-1][0].dtype == parameter.dtype
        if not same_dtype or size + parameter.nbytes > limit:
            buckets.append([])
            if size_mib == "auto":
                limit = max(MIN_BUCKET_MIB * MIB, BUCKET_FRACTION * to_come)
            else:
                limit = float("inf") if size_mib is None else size_mib * MIB
            size = 0
        buckets[-1].append(parameter)
        size += parameter.nbytes
        to_come -= parameter.nbytes
    return buckets


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
