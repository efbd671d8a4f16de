"""A unit of fully sharded data parallelism: weights that are unsharded, used and resharded together."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cs336_basics.model import Embedding
from cs336_systems.parallel.collectives import AllGather, Group, ReduceScatterMean, flatten

#: Each weight of a unit begins at a multiple of this many elements: matmuls are fastest on aligned operands.
ALIGNMENT = 64


class Slot(NamedTuple):
    """The place where a module keeps a parameter."""

    module: nn.Module
    name: str


class ShardRange(NamedTuple):
    """The elements of a flattened weight that a rank keeps: start ≤ i < stop."""

    shape: torch.Size
    start: int
    stop: int


class FSDPUnit:
    """Weights laid end to end in one flat tensor, of which rank r keeps the r-th of world_size equal parts.

        flat       | weight 0 ........ | weight 1 .. | weight 2 ............ | padding |
        shares     | rank 0 ....................... | rank 1 ......................... |

    One all-gather thus unshards all weights, in place, and one reduce-scatter averages all their gradients. A share may
    hold any part of a weight, or nothing of it.

    The modules use the shards, and the full weights only while they run. The full weights are parameters too, the ones
    that autograd knows; their storage is empty while the unit is resharded (as in Zhao et al. 2023, section 4.2).

    Args:
        modules: the modules that run with these weights.
        weights: the parameters, and where they are kept.
        compute_dtype: of the full weights and their gradients; None for the dtype of the weights.
        group, gradient_group: the ranks, for gathering weights and for reducing gradients.

    Attributes:
        modules: as given.
        shards: this rank's share of each weight, 1-D parameters that are parts of one tensor.
        ranges: the elements of each weight that are in this share.
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
        self._unsharding: AllGather | None = None
        self._is_unsharded = False
        self._reducing: ReduceScatterMean | None = None
        #: An embedding's lookup needs no weights in the backward pass.
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

        # The master weights: this rank's part of the flat tensor, and the shards as parts of it.
        self._master = torch.zeros(share, dtype=first.dtype, device=first.device)
        self.shards: list[nn.Parameter] = []
        self.ranges: list[ShardRange] = []
        for start, weight in zip(starts, weights):
            low, high = (min(max(edge - rank * share, 0), share) for edge in (start, start + weight.numel()))
            begin = max(rank * share - start, 0) if high > low else 0
            self.ranges.append(ShardRange(weight.shape, begin, begin + high - low))
            self._master[low:high] = weight.detach().reshape(-1)[begin : begin + high - low]
            self.shards.append(nn.Parameter(self._master[low:high], weight.requires_grad))

        # The full weights. `.data` gives them a version counter of their own: autograd takes a change of a tensor it
        # has saved for a mistake, and does not know that unsharding only restores what was there.
        self._flat = torch.empty(self._size, dtype=compute_dtype or first.dtype, device=first.device)
        self._bytes = self._flat.untyped_storage().nbytes()
        alias = self._flat.data
        self.full = [
            nn.Parameter(alias[start : start + weight.numel()].view(weight.shape), weight.requires_grad)
            for start, weight in zip(starts, weights)
        ]
        self._starts = starts
        self._trainable = [number for number, weight in enumerate(self.full) if weight.requires_grad]
        # A weight without a gradient on this rank sends zeros (`_missing`). If its shard had no gradient before, it may
        # receive the zeros of all ranks (`_filled`): then FSDP removes that gradient again.
        self._missing: set[int] = set()
        self._filled: set[int] = set()
        self._absent = len(self._trainable)  # gradients still to come in this backward pass
        self.use_shards()
        self._flat.untyped_storage().resize_(0)

    def start_unshard(self) -> None:
        """Start gathering the full weights, unless they are present or on their way."""
        if self._is_unsharded or self._unsharding:
            return
        self._flat.untyped_storage().resize_(self._bytes)
        self._unsharding = AllGather(self._flat, self._master.detach().to(self._flat.dtype), self._group)

    def unshard(self) -> None:
        """Gather the full weights, and wait for them."""
        self.start_unshard()
        if self._unsharding:
            self._unsharding.wait()
            self._unsharding, self._is_unsharded = None, True

    def use_full(self) -> None:
        """Let the modules use the full weights."""
        self._use(self.full)

    def use_shards(self) -> None:
        """Let the modules use the shards."""
        self._use(self.shards)

    def reshard(self) -> None:
        """Free the full weights."""
        if self._unsharding:  # prefetched, but then not used
            self._unsharding.wait()
            self._unsharding = None
        elif not self._is_unsharded:
            return
        self._is_unsharded = False
        self.use_shards()  # also after a forward pass that was interrupted
        self._flat.untyped_storage().resize_(0)

    def gradient_arrived(self) -> bool:
        """Count the gradient of a full weight. Return True if it was the last one of the backward pass."""
        self._absent -= 1
        return self._absent == 0

    def reshard_after_backward(self) -> None:
        """Reshard when all gradients have arrived, unless there is a frozen weight, which may still be needed."""
        if len(self._trainable) == len(self.full):
            self.reset()

    def reset(self) -> None:
        """Reshard, and expect all gradients again."""
        self._absent = len(self._trainable)
        self.reshard()

    def reduce_gradients(self) -> None:
        """Start averaging the gradients of the full weights, and drop them; a missing gradient counts as zeros."""
        self._missing.clear()
        parts, end = [], 0
        for number, (start, weight) in enumerate(zip(self._starts, self.full)):
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
        """Add this rank's share of the mean gradients to the shards' gradients."""
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
        """Drop the gradients of the full weights."""
        self._filled.clear()
        for weight in self.full:
            weight.grad = None

    @property
    def size(self) -> int:
        """Elements of the flat tensor, including its padding."""
        return self._size

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the full weights."""
        return self._flat.dtype

    @property
    def trainable(self) -> list[nn.Parameter]:
        """Shards of the weights that are trained."""
        return [self.shards[number] for number in self._trainable]

    def take_filled(self) -> list[nn.Parameter]:
        """Return the trained shards whose weights had no gradient on this rank since the last call."""
        filled = [self.shards[number] for number in sorted(self._filled)]
        self._filled.clear()
        return filled

    def full_weights(self) -> list[Tensor]:
        """Gather the full weights in the precision of the master weights, on every rank."""
        flat = self._master.new_empty(self._size)
        AllGather(flat, self._master, self._group).wait()
        return [
            flat[start : start + weight.numel()].view(weight.shape).clone()
            for start, weight in zip(self._starts, self.full)
        ]

    def _use(self, parameters: list[nn.Parameter]) -> None:
        """Put these parameters in the modules' slots."""
        for slots, parameter in zip(self._slots, parameters):
            for module, name in slots:
                module._parameters[name] = parameter
