"""A unit of fully sharded data parallelism: weights that are gathered, used and freed together."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cs336_basics.model import Embedding
from cs336_systems.parallel.collectives import AllGather, Group, ReduceScatterMean, flatten

#: Where a unit has several weights, each begins at a multiple of so many elements: matrix products want it.
ALIGNMENT = 64


class Slot(NamedTuple):
    """Where a module keeps a parameter."""

    module: nn.Module
    name: str


class ShardRange(NamedTuple):
    """Which elements of a weight, flattened, a process keeps: start ≤ i < stop."""

    shape: torch.Size
    start: int
    stop: int


class Unit:
    """Weights laid end to end in one flat tensor, of which process r keeps the r-th of world_size equal parts.

        flat       | weight 0 ........ | weight 1 .. | weight 2 ............ | padding |
        shares     | process 0 ................. | process 1 ......................... |

    One all-gather thus brings all weights, in place, and one reduce-scatter takes all their gradients. A share may hold
    any part of a weight, or nothing of it.

    The modules have the shards, and the whole weights only while they run. Those are parameters too, the ones that
    autograd knows; their storage is empty while they are not gathered (as in Zhao et al. 2023, section 4.2).

    Args:
        modules: what runs with these weights.
        weights: the parameters, and where they are kept.
        compute_dtype: of the gathered weights and their gradients; None for that of the weights.
        group, gradient_group: the processes, for gathering and for reducing.

    Attributes:
        modules: as given.
        shards: this process's share of each weight, 1-D parameters that are parts of one tensor.
        ranges: which elements these are.
    """

    def __init__(
        self,
        modules: list[nn.Module],
        weights: dict[nn.Parameter, list[Slot]],
        compute_dtype: torch.dtype | None,
        group: Group,
        gradient_group: Group,
    ) -> None:
        self.modules = modules
        self._group, self._gradient_group = group, gradient_group
        self._slots = list(weights.values())
        self._gathering: AllGather | None = None
        self._is_gathered = False
        self._reducing: ReduceScatterMean | None = None
        #: Looking rows up needs no weights in the backward pass.
        self.needed_in_backward = not all(isinstance(slot.module, Embedding) for slots in self._slots for slot in slots)

        first = next(iter(weights))
        if other := next((weight.dtype for weight in weights if weight.dtype != first.dtype), None):
            raise ValueError(f"a unit has weights of {first.dtype} and {other}; make them one dtype")
        world_size, rank = dist.get_world_size(group), dist.get_rank(group)
        starts, self._size = [], 0
        for weight in weights:
            starts.append(-(-self._size // ALIGNMENT) * ALIGNMENT)
            self._size = starts[-1] + weight.numel()
        self._size = -(-self._size // world_size) * world_size
        share = self._size // world_size

        # The master weights: this process's part of the flat tensor, and the shards as parts of it.
        self._master = torch.zeros(share, dtype=first.dtype, device=first.device)
        self.shards: list[nn.Parameter] = []
        self.ranges: list[ShardRange] = []
        for start, weight in zip(starts, weights):
            low, high = (min(max(edge - rank * share, 0), share) for edge in (start, start + weight.numel()))
            begin = max(rank * share - start, 0) if high > low else 0
            self.ranges.append(ShardRange(weight.shape, begin, begin + high - low))
            self._master[low:high] = weight.detach().reshape(-1)[begin : begin + high - low]
            self.shards.append(nn.Parameter(self._master[low:high], weight.requires_grad))

        # The whole weights. `.data` gives them a version counter of their own: autograd takes a change of a tensor it
        # has saved for a mistake, and does not know that gathering only brings back what was there.
        self._flat = torch.empty(self._size, dtype=compute_dtype or first.dtype, device=first.device)
        self._bytes = self._flat.untyped_storage().nbytes()
        alias = self._flat.data
        self.whole = [
            nn.Parameter(alias[start : start + weight.numel()].view(weight.shape), weight.requires_grad)
            for start, weight in zip(starts, weights)
        ]
        self._starts = starts
        self._trainable = [number for number, weight in enumerate(self.whole) if weight.requires_grad]
        # A weight without a gradient here sends zeros (`_missing`). If its shard had no gradient before, what it gets
        # may be the zeros of all processes (`_filled`): then FSDP takes it away again.
        self._missing: set[int] = set()
        self._filled: set[int] = set()
        self._absent = len(self._trainable)  # gradients still to come in this backward pass
        self.show_shards()
        self._flat.untyped_storage().resize_(0)

    def gather(self) -> None:
        """Begin to gather the weights, unless they are there or on their way."""
        if self._is_gathered or self._gathering:
            return
        self._flat.untyped_storage().resize_(self._bytes)
        self._gathering = AllGather(self._flat, self._master.detach().to(self._flat.dtype), self._group)

    def wait_gathered(self) -> None:
        """Gather the weights."""
        self.gather()
        if self._gathering:
            self._gathering.wait()
            self._gathering, self._is_gathered = None, True

    def show_whole(self) -> None:
        """Give the modules the whole weights."""
        self._show(self.whole)

    def show_shards(self) -> None:
        """Give the modules the shards."""
        self._show(self.shards)

    def free(self) -> None:
        """Free the whole weights."""
        if self._gathering:  # ahead, and then nobody used them
            self._gathering.wait()
            self._gathering = None
        elif not self._is_gathered:
            return
        self._is_gathered = False
        self.show_shards()  # also after a forward pass that was interrupted
        self._flat.untyped_storage().resize_(0)

    def gradient_arrived(self) -> bool:
        """Count the gradient of a whole weight. True if it was the last one of the backward pass."""
        self._absent -= 1
        return self._absent == 0

    def backward_done(self) -> None:
        """All gradients are there, so that no trained weight is needed any more; a frozen one may still be."""
        if len(self._trainable) == len(self.whole):
            self.reset()

    def reset(self) -> None:
        """Free the weights, and expect all gradients anew."""
        self._absent = len(self._trainable)
        self.free()

    def reduce_gradients(self) -> None:
        """Begin to average the gradients of the whole weights, and drop them; one that is missing counts as zeros."""
        self._missing.clear()
        parts, end = [], 0
        for number, (start, weight) in enumerate(zip(self._starts, self.whole)):
            parts += [self._flat.new_zeros(start - end)] if start > end else []
            if weight.grad is None:
                parts.append(self._flat.new_zeros(weight.shape))
                self._missing.add(number)
            else:
                parts.append(weight.grad)
                self._filled.discard(number)
                weight.grad = None
            end = start + weight.numel()
        parts += [self._flat.new_zeros(self._size - end)] if self._size > end else []
        gradients = parts[0].reshape(-1) if len(parts) == 1 else flatten(parts)
        self._reducing = ReduceScatterMean(gradients, self._gradient_group)

    def finish_reducing(self) -> None:
        """Add this process's share of the mean gradients to the shards' gradients."""
        assert self._reducing is not None
        mean = self._reducing.wait(self._master.dtype)
        self._reducing = None
        for number in self._trainable:
            shard = self.shards[number]
            if shard.grad is None and number in self._missing:
                self._filled.add(number)
            low = shard.storage_offset()
            part = mean[low : low + shard.numel()]
            shard.grad = part if shard.grad is None else shard.grad + part

    def drop_gradients(self) -> None:
        """Forget the gradients of whole weights."""
        self._filled.clear()
        for weight in self.whole:
            weight.grad = None

    @property
    def size(self) -> int:
        """Elements of the flat tensor, its gaps included."""
        return self._size

    @property
    def dtype(self) -> torch.dtype:
        """Of the whole weights."""
        return self._flat.dtype

    @property
    def trainable(self) -> list[nn.Parameter]:
        """The shards of the weights that are trained."""
        return [self.shards[number] for number in self._trainable]

    def take_filled(self) -> list[nn.Parameter]:
        """The trained shards whose weights never had a gradient in this process since the last call."""
        filled = [self.shards[number] for number in sorted(self._filled)]
        self._filled.clear()
        return filled

    def full_weights(self) -> list[Tensor]:
        """The whole weights in the precision of the master weights, on every process."""
        flat = self._master.new_empty(self._size)
        AllGather(flat, self._master, self._group).wait()
        return [
            flat[start : start + weight.numel()].view(weight.shape).clone()
            for start, weight in zip(self._starts, self.whole)
        ]

    def _show(self, parameters: list[nn.Parameter]) -> None:
        """Let the modules have these in place of their weights."""
        for slots, parameter in zip(self._slots, parameters):
            for module, name in slots:
                module._parameters[name] = parameter
