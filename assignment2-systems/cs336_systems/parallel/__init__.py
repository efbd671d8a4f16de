"""Data parallelism from collectives: from one all-reduce per gradient to fully sharded weights.

NaiveDataParallel           data_parallel.py             one all-reduce per gradient, after the backward pass
FlatDataParallel            data_parallel.py             one all-reduce of everything, after the backward pass
OverlappedDataParallel      overlapped.py                one all-reduce per gradient, during the backward pass
BucketedDataParallel        overlapped.py                one all-reduce per bucket, during the backward pass
ShardedOptimizer            sharded_optimizer.py         each rank updates a share of the parameters
FSDP                        fsdp.py, fsdp_unit.py        each rank keeps a share of weights, gradients and state
fully_shard_blocks          torch_fsdp2.py               the same by PyTorch's FSDP2, to compare with
"""

from cs336_systems.parallel.data_parallel import DataParallel, FlatDataParallel, NaiveDataParallel
from cs336_systems.parallel.fsdp import FSDP
from cs336_systems.parallel.overlapped import BucketedDataParallel, OverlappedDataParallel
from cs336_systems.parallel.sharded_optimizer import ShardedOptimizer

__all__ = [
    "FSDP",
    "BucketedDataParallel",
    "DataParallel",
    "FlatDataParallel",
    "NaiveDataParallel",
    "OverlappedDataParallel",
    "ShardedOptimizer",
]
