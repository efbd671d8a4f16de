"""Fully sharded data parallelism: each rank keeps a share of every weight, and full weights only while in use."""

import weakref
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook
from torch.utils._pytree import tree_leaves, tree_map

from cs336_basics.model import Embedding, Linear
from cs336_basics.nn_utils import gradient_norm, scale_gradients
from cs336_systems.parallel.collectives import Group, all_reduce_sum, check_same_on_all_ranks
from cs336_systems.parallel.data_parallel import FlatDataParallel
from cs336_systems.parallel.fsdp_unit import FSDPUnit, ShardRange, Slot


class FSDP(FlatDataParallel):
    """ZeRO stage 3 (Rajbhandari et al. 2020, Zhao et al. 2023): one all-gather and one reduce-scatter per unit.

    The weights of `Linear` and `Embedding` are sharded. Those inside a module of one of `unit_classes` form a unit and
    are unsharded and resharded together. Other parameters, those of norms, are small: every rank keeps them, and their
    gradients are averaged at the end. Time goes to the right:

        forward    communicate | unshard 0 | unshard 1 | unshard 2 |
                   compute                 | unit 0    | unit 1    | unit 2 |
                   reshard                             ^ 0         ^ 1        (the last unit stays unsharded)

        backward   communicate | unshard 1 | unshard 0; reduce-scatter 2 | reduce-scatter 1 | reduce-scatter 0 |
                   compute     | unit 2    | unit 1                      | unit 0           |
                   reshard                 ^ 2                           ^ 1                ^ 0

    Outside of a pass the sharded parameters of the module are 1-D shares, and so are their gradients after
    `finish_gradient_synchronization()`, as an optimizer needs them. If two units share a weight, they become one unit.
    Every rank must run the same units in the same order, and its loss must reach all of them; which weights of a unit
    get gradients may differ. The first forward pass knows no order yet and prefetches nothing. A frozen weight, once
    unsharded in a backward pass, stays until the pass is finished. (The base class serves the parameters that every
    rank keeps.)

    To abandon a backward pass, call `zero_grad()` of this module: an optimizer's does not reach full gradients. Under
    `no_sync()` full gradients are kept, in `compute_dtype`. Backward passes without `no_sync()` accumulate shares,
    which costs messages but no memory.

    Args:
        module: the module, on the device where it trains.
        compute_dtype: to which weights are cast before they are sent, and floating-point inputs of a unit before they
            are used; gradients are sent in it too. None: no casts.
        unit_classes: modules that form a unit; of nested ones the outermost. With a block of a Transformer as the unit
            there are fewer and larger messages, and torch.compile sees the code of a block as a whole.
        group: the ranks that share the work; None for all.

    Raises:
        ValueError: the ranks have different modules; a unit has weights of several dtypes; a weight is also used
            outside of `Linear` and `Embedding`.
    """

    def __init__(
        self,
        module: nn.Module,
        compute_dtype: torch.dtype | None = None,
        unit_classes: tuple[type[nn.Module], ...] = (Linear, Embedding),
        group: Group = None,
    ) -> None:
        super().__init__(module, group)
        self.compute_dtype = compute_dtype
        found = _find_units(module, unit_classes)
        # With NCCL a group has a stream of its own: gradients need not queue behind weights.
        ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
        gradient_group = dist.new_group(ranks, use_local_synchronization=group is not None)
        self.units = [FSDPUnit(modules, weights, compute_dtype, group, gradient_group) for modules, weights in found]
        layout = [f"a unit of {unit.size} elements in {unit.dtype}" for unit in self.units]
        check_same_on_all_ranks(layout, "units of sharded weights", group)
        shards = {shard for unit in self.units for shard in unit.shards}
        self.trainable = [p for p in module.parameters() if p.requires_grad and p not in shards]
        this: Any = weakref.proxy(self)  # what a gradient's hook holds is never freed: Python cannot see the cycle
        for number, unit in enumerate(self.units):
            for part in unit.modules:
                part.register_forward_pre_hook(partial(self._before_forward, unit), with_kwargs=True)
                part.register_forward_hook(partial(self._after_forward, unit), always_call=True)
            for weight in unit.full:
                if weight.requires_grad:
                    weight.register_post_accumulate_grad_hook(partial(type(self)._on_gradient, this, number))
        self._in_backward = False
        self._ran: dict[FSDPUnit, None] = {}  # the units of all forward passes since gradients were last finished
        self._trace: list[FSDPUnit] = []  # the units of this forward pass so far
        self._last_trace: list[FSDPUnit] = []  # the units of the last one, which tell what to prefetch ...
        self._same_as_last = True  # ... as long as the two agree
        self._to_reduce: list[FSDPUnit] | None = None  # units whose gradients are still to be sent, in this order
        self._complete: set[FSDPUnit] = set()  # those of them whose gradients have all arrived
        self._reducing: list[FSDPUnit] = []  # units whose gradients are being reduced

    def _apply(self, *_: Any, **__: Any) -> "FSDP":  # what `to`, `cuda`, `double` and the like call
        raise RuntimeError(
            "the shards of an FSDP module cannot be moved or cast; move or cast the module before wrapping it"
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self._reduce_rest()
        self._reset_units()
        self._last_trace, self._trace, self._same_as_last = self._trace, [], True
        return self.module(*args, **kwargs)

    def finish_gradient_synchronization(self) -> None:
        if self._to_reduce is None:  # the last backward pass was under no_sync
            self._plan()
        self._reduce_rest()
        self._finish_reducing(still_under_way=0)
        shards = [shard for unit in self.units for shard in unit.trainable]
        self._drop_absent(shards, [shard for unit in self.units for shard in unit.take_filled()])
        super().finish_gradient_synchronization()
        self._reset_units()
        self._ran.clear()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients, including those of full weights and those being reduced, which no optimizer sees."""
        self._finish_reducing(still_under_way=0)
        for unit in self.units:
            unit.drop_gradients()
        super().zero_grad(set_to_none)

    def clip_gradient(self, max_norm: float) -> Tensor:
        shards = [shard for unit in self.units for shard in unit.shards]
        device = next(self.module.parameters()).device  # the norm of no gradients is on the CPU
        sharded, replicated = (gradient_norm(parameters).to(device).square() for parameters in (shards, self.trainable))
        all_reduce_sum(sharded, self.group)
        norm = (sharded + replicated).sqrt()
        scale_gradients([*shards, *self.trainable], norm, max_norm)
        return norm

    @torch.no_grad()
    def gather_full_params(self) -> dict[str, Tensor]:
        """Gather all parameters in full precision on every rank, by their names in the wrapped module."""
        full = {shard: weight for unit in self.units for shard, weight in zip(unit.shards, unit.full_weights())}
        return {name: full.get(p, p.detach().clone()) for name, p in self.module.named_parameters()}

    def shard_ranges(self) -> dict[str, ShardRange]:
        """Return which elements of the sharded parameters this rank keeps, by their names in the wrapped module."""
        ranges = {shard: range_ for unit in self.units for shard, range_ in zip(unit.shards, unit.ranges)}
        named = self.module.named_parameters(remove_duplicate=False)  # a tied weight by all its names
        return {name: ranges[p] for name, p in named if p in ranges}

    def _before_forward(
        self, unit: FSDPUnit, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        unit.unshard()
        unit.use_full()
        if not self._in_backward:  # a forward pass inside a backward pass is one that checkpointing repeats
            self._trace.append(unit)
            self._ran[unit] = None
            self._same_as_last &= self._last_trace[len(self._trace) - 1 : len(self._trace)] == [unit]
            if self._same_as_last and len(self._trace) < len(self._last_trace):
                self._last_trace[len(self._trace)].start_unshard()
        if self.compute_dtype is None:
            return None
        return tree_map(self._cast, (args, kwargs))

    def _after_forward(self, unit: FSDPUnit, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._in_backward:
            return
        unit.use_shards()
        outputs = [x for x in tree_leaves(output) if isinstance(x, Tensor) and x.requires_grad]
        if outputs:
            before = self._trace[-2] if len(self._trace) > 1 else None
            register_multi_grad_hook(outputs, partial(self._before_backward, unit, before), mode="any")
        is_last = self._same_as_last and len(self._trace) == len(self._last_trace)
        if not (outputs and is_last):  # the last unit is the first that the backward pass needs
            unit.reshard()

    def _before_backward(self, unit: FSDPUnit, before: FSDPUnit | None, _: Tensor) -> None:
        self._in_backward = True
        if unit.needed_in_backward:
            unit.unshard()
            unit.use_full()  # for what a checkpoint inside of the unit computes again
        if before is not None and before.needed_in_backward:
            before.start_unshard()

    def _on_gradient(self, number: int, _: nn.Parameter) -> None:
        unit = self.units[number]
        if not unit.gradient_arrived():
            return
        unit.reshard_after_backward()
        if not self._synchronizing:
            return
        if not self._to_reduce or unit not in self._to_reduce:  # the first unit of a backward pass
            self._reduce_rest()
            self._plan()
        self._complete.add(unit)
        while self._to_reduce and self._to_reduce[0] in self._complete:
            self._reduce(self._to_reduce.pop(0))

    def _plan(self) -> None:
        """Fix the order in which gradients are sent on all ranks: the reverse of the forward pass."""
        order = dict.fromkeys([*reversed(dict.fromkeys(self._trace)), *self._ran])
        self._to_reduce = [unit for unit in order if unit.trainable]
        self._complete.clear()

    def _reduce_rest(self) -> None:
        """Send the gradients of units that still wait for gradients which will not come."""
        for unit in self._to_reduce or []:
            self._reduce(unit)
        self._to_reduce = []

    def _reduce(self, unit: FSDPUnit) -> None:
        # The gradients of at most two units are being reduced: more would hold memory without being faster.
        self._finish_reducing(still_under_way=1)
        unit.reduce_gradients()
        self._reducing.append(unit)

    def _finish_reducing(self, still_under_way: int) -> None:
        while len(self._reducing) > still_under_way:
            self._reducing.pop(0).finish_reducing()

    def _reset_units(self) -> None:
        for unit in self.units:
            unit.reset()
        self._in_backward, self._to_reduce = False, None

    def _cast(self, x: Any) -> Any:
        return x.to(self.compute_dtype) if isinstance(x, Tensor) and x.is_floating_point() else x


def _find_units(
    module: nn.Module, unit_classes: tuple[type[nn.Module], ...]
) -> list[tuple[list[nn.Module], dict[nn.Parameter, list[Slot]]]]:
    """Find the modules of each unit, and its weights with the places where they are kept."""
    units: list[tuple[list[nn.Module], dict[nn.Parameter, list[Slot]]]] = []
    for root in dict.fromkeys(_outermost(module, unit_classes)):  # once, even if it appears in several places
        modules, weights = [root], _weights(root)
        for other in [unit for unit in units if unit[1].keys() & weights.keys()]:  # tied: one unit
            units.remove(other)
            modules = other[0] + modules
            weights = {p: [*other[1].get(p, []), *weights.get(p, [])] for p in other[1] | weights}
        if weights:
            units.append((modules, weights))
    sharded = {weight for _, weights in units for weight in weights}
    slots = {slot for _, weights in units for places in weights.values() for slot in places}
    for name, part in module.named_modules():
        for own_name, parameter in part.named_parameters(recurse=False):
            if parameter in sharded and Slot(part, own_name) not in slots:
                raise ValueError(
                    f"{name}.{own_name} of {type(part).__name__} is tied to a weight that is sharded; only Linear and "
                    "Embedding can share one: untie it"
                )
    return units


def _outermost(module: nn.Module, classes: tuple[type[nn.Module], ...]) -> Iterator[nn.Module]:
    if isinstance(module, classes):
        yield module
        return
    for child in module.children():
        yield from _outermost(child, classes)


def _weights(module: nn.Module) -> dict[nn.Parameter, list[Slot]]:
    weights: dict[nn.Parameter, list[Slot]] = {}
    for part in module.modules():
        if isinstance(part, Linear | Embedding):
            for name, parameter in part.named_parameters(recurse=False):
                weights.setdefault(parameter, []).append(Slot(part, name))
    return weights
