"""Data parallelism out of collectives: from one all-reduce a gradient to fully sharded weights.

NaiveDataParallel           naive.py              one all-reduce a gradient, after the backward pass
FlatDataParallel            flat.py               one all-reduce of everything, after the backward pass
OverlappedDataParallel      overlapped.py         one all-reduce a gradient, during the backward pass
BucketedDataParallel        bucketed.py           one all-reduce a bucket, during the backward pass
ShardedOptimizer            sharded_optimizer.py  each process updates a share of the parameters
FSDP                        fsdp.py, unit.py      each process keeps a share of weights, gradients and optimizer state
"""

from cs336_systems.parallel.bucketed import BucketedDataParallel
from cs336_systems.parallel.flat import FlatDataParallel
from cs336_systems.parallel.fsdp import FSDP
from cs336_systems.parallel.naive import NaiveDataParallel
from cs336_systems.parallel.overlapped import OverlappedDataParallel
from cs336_systems.parallel.sharded_optimizer import ShardedOptimizer

__all__ = [
    "FSDP",
    "BucketedDataParallel",
    "FlatDataParallel",
    "NaiveDataParallel",
    "OverlappedDataParallel",
    "ShardedOptimizer",
]
