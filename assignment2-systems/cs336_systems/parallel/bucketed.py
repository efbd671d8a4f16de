"""Bucketed: overlapped, but in messages large enough that the latency of a message does not count."""

from typing import Literal

from torch import nn

from cs336_systems.parallel.collectives import Group
from cs336_systems.parallel.overlapped import Bucket, OverlappedDataParallel

MB = 2**20
#: Where no size is given: the share of the gradients still to come that makes a bucket, and the least size in MB.
SHARE, LEAST_MB = 1 / 4, 25


class BucketedDataParallel(OverlappedDataParallel):
    """Gradients travel in buckets, filled in reverse order of the parameters (Li et al. 2020, section 3.2.2).

    Buckets of one size are a compromise: a message costs the host 0.1 to 0.2 ms, so they should be large; but nothing
    hides the last one, so it should be small. Without a size, buckets shrink: each takes a fixed share of the gradients
    that are still to come. A large one then travels while a long backward pass is still ahead, only a small one when it
    is over. There are few of them: their number grows with the logarithm of the model's size.

    Args:
        module, group: see `DataParallel`.
        bucket_size_mb: a bucket holds at most so many MB (of 2^20 bytes) of gradients, unless a single one is larger.
            None: all gradients of a dtype that follow one another in one bucket. auto: they shrink.
    """

    def __init__(
        self, module: nn.Module, bucket_size_mb: float | Literal["auto"] | None = "auto", group: Group = None
    ) -> None:
        if isinstance(bucket_size_mb, int | float) and bucket_size_mb <= 0:
            raise ValueError(f"bucket_size_mb is {bucket_size_mb}, but must be positive, or None for one bucket")
        self._bucket_size_mb = bucket_size_mb
        super().__init__(module, group)

    def _fill_buckets(self) -> list[Bucket]:
        return fill_buckets(self.trainable, self._bucket_size_mb)


def fill_buckets(parameters: list[nn.Parameter], size_mb: float | Literal["auto"] | None) -> list[Bucket]:
    """Parameters in reverse order, in buckets of that size; see `BucketedDataParallel`."""
    to_come = sum(parameter.nbytes for parameter in parameters)
    buckets: list[Bucket] = []
    size = limit = 0.0
    for parameter in reversed(parameters):
        same_dtype = buckets and buckets[-1][0].dtype == parameter.dtype
        if not same_dtype or size + parameter.nbytes > limit:
            buckets.append([])
            if size_mb == "auto":
                limit = max(LEAST_MB * MB, SHARE * to_come)
            else:
                limit = float("inf") if size_mb is None else size_mb * MB
            size = 0
        buckets[-1].append(parameter)
        size += parameter.nbytes
        to_come -= parameter.nbytes
    return buckets
