"""The collectives that data parallelism is made of, each started in the background.

Each returns an object with a method `wait()`. With NCCL it makes the GPU's current stream wait, and the host continues;
with gloo the host waits. Every rank of a group must start the same collectives in the same order.

NCCL reads and writes tensors in place, on the GPU. Several of gloo's collectives do not accept GPU tensors, so all of
them get copies in host memory (`_buffers`), and the results are copied back at `wait()`.
"""

from collections.abc import Iterable
from itertools import repeat
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
import torch.distributed as dist

# Imported here so that it is imported before a process group exists. Its functions take the default group as a default
# argument, so imported later, as by the first step of an optimizer, they would keep the group and the threads of gloo
# alive after destroy_process_group; a thread that then frees a tensor while the interpreter exits aborts the process.
import torch.distributed.nn.functional
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _coalescing_manager  # what FSDP2 groups its messages with

# Renamed in torch 2.13, where the older names warn.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

#: A group of ranks; None is all of them.
Group = dist.ProcessGroup | None
T = TypeVar("T")


@runtime_checkable
class Work(Protocol):
    """A collective in progress."""

    def wait(self) -> object: ...


class AllReduceMean:
    """Replace tensors of one dtype, in place, by their means over the ranks. The result is valid after `wait()`.

    They are sent in one message without being copied together: NCCL takes a list of tensors in one kernel.
    """

    def __init__(self, tensors: list[Tensor], group: Group = None) -> None:
        self._tensors = tensors
        self._buffers = _buffers(tensors, group)
        operation, self._divisor = _mean(group)
        self._work = _all_reduce(self._buffers, operation, group)

    def wait(self) -> None:
        self._work.wait()
        for tensor, buffer in zip(self._tensors, self._buffers):
            if self._divisor != 1:
                buffer.div_(self._divisor)
            if buffer is not tensor:
                tensor.copy_(buffer)


class ReduceScatterMean:
    """Average a 1-D tensor over the ranks and keep one share of it: rank r keeps the r-th of equal parts."""

    def __init__(self, tensor: Tensor, group: Group = None) -> None:
        self._device = tensor.device
        (self._buffer,) = _buffers([tensor], group)  # alive until the collective has read it
        self._share = self._buffer.new_empty(tensor.numel() // dist.get_world_size(group))
        operation, self._divisor = _mean(group)
        self._work = _reduce_scatter(self._share, self._buffer, operation, group, async_op=True)

    def wait(self, dtype: torch.dtype) -> Tensor:
        """Return this rank's share [numel / world_size], cast to `dtype`."""
        self._work.wait()
        share = self._share.to(self._device, dtype)
        return share.div_(self._divisor) if self._divisor != 1 else share


def _all_reduce(tensors: list[Tensor], operation: dist.ReduceOp.RedOpType, group: Group) -> Work:
    """Reduce tensors of one dtype in one message. (PyTorch's public function for this warns of a new name.)"""
    options = dist.AllreduceCoalescedOptions()
    options.reduceOp = dist.ReduceOp(operation)
    options.asyncOp = True
    group = group or dist.group.WORLD
    assert group is not None, "no process group: call init_process_group first"
    return group.allreduce_coalesced(tensors, options)


class AllGather:
    """Put the shares of all ranks end to end into `output`, 1-D and contiguous. Valid after `wait()`."""

    def __init__(self, output: Tensor, share: Tensor, group: Group = None) -> None:
        self._output = output
        self._gathered, self._share = _buffers([output, share], group)  # alive until the collective has used them
        self._work = _all_gather(self._gathered, self._share, group, async_op=True)

    def wait(self) -> None:
        self._work.wait()
        if self._gathered is not self._output:
            self._output.copy_(self._gathered)


def all_reduce_sum(tensor: Tensor, group: Group = None) -> None:
    """Replace a tensor by its sum over the ranks."""
    (buffer,) = _buffers([tensor], group)
    _all_reduce([buffer], dist.ReduceOp.SUM, group).wait()
    if buffer is not tensor:
        tensor.copy_(buffer)


def broadcast(tensors: Iterable[Tensor], sources: Iterable[int] = repeat(0), group: Group = None) -> None:
    """Give every rank the values that rank `source` of the group has, for each tensor and its source.

    With NCCL all tensors are sent in one message, in which different sources use their links at the same time.
    """
    pairs = list(zip(tensors, sources))
    if not pairs:
        return
    buffers = _buffers([tensor.detach() for tensor, _ in pairs], group)
    together = dist.get_backend(group) == dist.Backend.NCCL
    with _coalescing_manager(group, buffers[0].device if together else None, async_ops=True) as coalesced:
        under_way = [
            dist.broadcast(buffer, group=group, group_src=source, async_op=True)
            for buffer, (_, source) in zip(buffers, pairs)
        ]
    for work in coalesced.works if together else under_way:
        work.wait()
    for buffer, (tensor, _) in zip(buffers, pairs):
        if buffer.data_ptr() != tensor.data_ptr():
            tensor.detach().copy_(buffer)


def _buffers(tensors: list[Tensor], group: Group) -> list[Tensor]:
    """Memory to send from and receive into: that of the tensors if they are contiguous, otherwise copies.

    With gloo, GPU tensors are copied to host memory, which waits until the GPU has computed them.
    """
    if tensors[0].is_cuda and dist.get_backend(group) == dist.Backend.GLOO:
        return [tensor.cpu() for tensor in tensors]
    return [tensor.contiguous() for tensor in tensors]


def all_gather_objects(mine: T, group: Group = None) -> list[T]:
    """Collect an object from every rank; every rank gets the list, ordered by rank."""
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group=group)
    return everyone


def check_same_on_all_ranks(lines: list[str], what: str, group: Group = None) -> None:
    """Compare a description, line by line, with rank 0's.

    Raises:
        ValueError: on every rank, if any of them differs; it names the ranks and the first difference.
    """
    all_lines = all_gather_objects(lines, group)
    first = all_lines[0]
    different = [rank for rank, other in enumerate(all_lines) if other != first]
    if not different:
        return
    other = all_lines[different[0]]
    position = next((i for i, (a, b) in enumerate(zip(first, other)) if a != b), min(len(first), len(other)))
    expected, found = (lines[position] if position < len(lines) else "nothing" for lines in (first, other))
    raise ValueError(
        f"the ranks have different {what}: rank 0 has {expected}, rank {different[0]} has {found} "
        f"(differing from rank 0: {', '.join(map(str, different))}); start all of them with the same options"
    )


def describe(module: nn.Module) -> list[str]:
    """Describe a module in one line per parameter and buffer: name, shape, dtype, and whether it is frozen."""
    parameters = [
        f"parameter {name} {tuple(p.shape)} {p.dtype}{'' if p.requires_grad else ' frozen'}"
        for name, p in module.named_parameters()
    ]
    return parameters + [f"buffer {name} {tuple(b.shape)} {b.dtype}" for name, b in module.named_buffers()]


def _mean(group: Group) -> tuple[dist.ReduceOp.RedOpType, int]:
    """Choose the reduction for a mean, and the number to divide its result by: only NCCL can average."""
    if dist.get_backend(group) == dist.Backend.NCCL:
        return dist.ReduceOp.AVG, 1
    return dist.ReduceOp.SUM, dist.get_world_size(group)


def flatten(tensors: list[Tensor]) -> Tensor:
    """Copy tensors of one dtype end to end into a new 1-D tensor, [sum of numels]."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def gradient(parameter: nn.Parameter) -> Tensor:
    """Return the gradient of a parameter that has one."""
    assert parameter.grad is not None
    return parameter.grad
