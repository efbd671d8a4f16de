"""Bucketed: overlapped, but in messages large enough that the latency of a message does not count."""

from typing import Literal

from torch import nn

from cs336_systems.parallel.collectives import Group
from cs336_systems.parallel.flat import Bucket
from cs336_systems.parallel.overlapped import OverlappedDataParallel

MB = 2**20
#: The size of a bucket where none is given: at least so many MB, and so many that there are about so many messages at
#: most. Each costs the host 0.1 to 0.2 ms, which an eager backward pass, for which the GPU waits anyway, cannot hide.
LEAST_MB, MOST_MESSAGES = 25, 64


class BucketedDataParallel(OverlappedDataParallel):
    """Gradients travel in buckets, filled in reverse order of the parameters (Li et al. 2020, section 3.2.2).

    Args:
        module, group: see `DataParallel`.
        bucket_size_mb: a bucket holds at most so many MB (of 2^20 bytes) of gradients, unless a single one is larger.
            None: all gradients of a dtype that follow one another in one bucket. auto: by the size of the model.
    """

    def __init__(
        self, module: nn.Module, bucket_size_mb: float | Literal["auto"] | None = "auto", group: Group = None
    ) -> None:
        if bucket_size_mb == "auto":
            gradients = sum(parameter.nbytes for parameter in module.parameters() if parameter.requires_grad)
            bucket_size_mb = max(LEAST_MB, gradients / MB / MOST_MESSAGES)
        if bucket_size_mb is not None and bucket_size_mb <= 0:
            raise ValueError(f"bucket_size_mb is {bucket_size_mb}, but must be positive, or None for one bucket")
        self._bucket_bytes = float("inf") if bucket_size_mb is None else bucket_size_mb * MB
        super().__init__(module, group)

    def _fill_buckets(self) -> list[Bucket]:
        buckets: list[list[nn.Parameter]] = []
        size = 0
        for parameter in reversed(self.trainable):
            same_dtype = buckets and buckets[-1][0].dtype == parameter.dtype
            if not same_dtype or size + parameter.nbytes > self._bucket_bytes:
                buckets.append([])
                size = 0
            buckets[-1].append(parameter)
            size += parameter.nbytes
        return [Bucket(parameters) for parameters in buckets]
