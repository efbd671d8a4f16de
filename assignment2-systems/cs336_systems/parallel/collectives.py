"""The collectives that data parallelism is made of, each started in the background.

A collective returns something to `wait()` for. With NCCL that makes the GPU's current stream wait, and the host goes
on; with gloo the host waits. Every process of a group must start the same collectives in the same order.

NCCL reads and writes tensors where they lie, on the GPU. Several of gloo's collectives accept no GPU tensors, so all of
them get copies in host memory (`_buffers`), and the results are copied back at `wait()`.
"""

from collections.abc import Iterable
from itertools import repeat
from typing import Protocol, runtime_checkable

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

#: A group of processes; None is all of them.
Group = dist.ProcessGroup | None


@runtime_checkable
class Pending(Protocol):
    """A collective under way."""

    def wait(self) -> object: ...


class AllReduceMean:
    """Replace tensors of one dtype, in place, by their means over the processes. Valid after `wait()`.

    They travel in one message, from where they lie: NCCL takes a list of them in one kernel, without a copy.
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
    """Average a 1-D tensor over the processes and keep one share of it: process r the r-th of equal parts."""

    def __init__(self, tensor: Tensor, group: Group = None) -> None:
        self._device = tensor.device
        (self._buffer,) = _buffers([tensor], group)  # alive until the collective has read it
        self._share = self._buffer.new_empty(tensor.numel() // dist.get_world_size(group))
        operation, self._divisor = _mean(group)
        self._work = _reduce_scatter(self._share, self._buffer, operation, group, async_op=True)

    def wait(self, dtype: torch.dtype) -> Tensor:
        """[numel / world_size] The share, as `dtype`."""
        self._work.wait()
        share = self._share.to(self._device, dtype)
        return share.div_(self._divisor) if self._divisor != 1 else share


def _all_reduce(tensors: list[Tensor], operation: dist.ReduceOp.RedOpType, group: Group) -> Pending:
    """Reduce tensors of one dtype in one message. (PyTorch's function for this warns that it will change its name.)"""
    options = dist.AllreduceCoalescedOptions()
    options.reduceOp = dist.ReduceOp(operation)
    options.asyncOp = True
    group = group or dist.group.WORLD
    assert group is not None, "join the processes first: init_process_group"
    return group.allreduce_coalesced(tensors, options)


class AllGather:
    """Lay the shares of all processes end to end in `output`, 1-D and contiguous. Valid after `wait()`."""

    def __init__(self, output: Tensor, share: Tensor, group: Group = None) -> None:
        self._output = output
        self._gathered, self._share = _buffers([output, share], group)  # alive until the collective has used them
        self._work = _all_gather(self._gathered, self._share, group, async_op=True)

    def wait(self) -> None:
        self._work.wait()
        if self._gathered is not self._output:
            self._output.copy_(self._gathered)


def all_reduce_sum(tensor: Tensor, group: Group = None) -> None:
    """Replace a tensor by its sum over the processes."""
    (buffer,) = _buffers([tensor], group)
    _all_reduce([buffer], dist.ReduceOp.SUM, group).wait()
    if buffer is not tensor:
        tensor.copy_(buffer)


def broadcast(tensors: Iterable[Tensor], sources: Iterable[int] = repeat(0), group: Group = None) -> None:
    """Give every process the values that process `source` of the group has, for each tensor and its source.

    With NCCL they travel in one message, in which those of different sources use their links at the same time.
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
    """The memory that a message is sent from and received in: the tensors' own if they are contiguous, else copies.

    With gloo the copies of GPU tensors are in host memory, for which this waits until the GPU has computed them.
    """
    if tensors[0].is_cuda and dist.get_backend(group) == dist.Backend.GLOO:
        return [tensor.cpu() for tensor in tensors]
    return [tensor.contiguous() for tensor in tensors]


def check_same_everywhere(lines: list[str], what: str, group: Group = None) -> None:
    """Compare a description, line by line, with process 0's.

    Raises:
        ValueError: on every process, if any of them differs; it names the processes and the first difference.
    """
    theirs: list[list[str] | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(theirs, lines, group=group)
    first = theirs[0] or []
    different = [rank for rank, other in enumerate(theirs) if other != first]
    if not different:
        return
    other = theirs[different[0]] or []
    position = next((i for i, (a, b) in enumerate(zip(first, other)) if a != b), min(len(first), len(other)))
    ours, others = (lines[position] if position < len(lines) else "nothing" for lines in (first, other))
    raise ValueError(
        f"the processes have different {what}: process 0 has {ours}, process {different[0]} has {others} "
        f"(differing from process 0: {', '.join(map(str, different))}); start all of them with the same options"
    )


def describe(module: nn.Module) -> list[str]:
    """A line for each parameter and buffer: name, shape, dtype and whether it is trained."""
    parameters = [
        f"parameter {name} {tuple(p.shape)} {p.dtype}{'' if p.requires_grad else ' frozen'}"
        for name, p in module.named_parameters()
    ]
    return parameters + [f"buffer {name} {tuple(b.shape)} {b.dtype}" for name, b in module.named_buffers()]


def _mean(group: Group) -> tuple[dist.ReduceOp.RedOpType, int]:
    """The reduction that gives a mean, and what its result is still to be divided by: only NCCL has a mean."""
    if dist.get_backend(group) == dist.Backend.NCCL:
        return dist.ReduceOp.AVG, 1
    return dist.ReduceOp.SUM, dist.get_world_size(group)


def flatten(tensors: list[Tensor]) -> Tensor:
    """[sum of numels]: the tensors, which have one dtype, end to end, in memory of their own."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def gradient(parameter: nn.Parameter) -> Tensor:
    """The gradient of a parameter that has one."""
    assert parameter.grad is not None
    return parameter.grad
