"""Assignment 1's training loop on many devices: strategies, by name.

Each is a `cs336_basics.strategy.Strategy`, so that the loop is that of a laptop. Each reads the checkpoints of all
others, written by any number of processes: a run may go on under another strategy.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from cs336_basics.checkpoint import save_checkpoint
from cs336_basics.model import BasicsTransformerLM, Embedding, Linear, TransformerBlock
from cs336_basics.muon import Muon, parameters_for
from cs336_basics.optimizer import AdamW
from cs336_basics.strategy import SingleDevice
from cs336_systems.parallel import FSDP, BucketedDataParallel, OverlappedDataParallel, ShardedOptimizer
from cs336_systems.parallel.base import DataParallel
from cs336_systems.parallel.collectives import AllReduceMean, broadcast
from cs336_systems.parallel.process_group import Process
from cs336_systems.parallel.sharded_checkpoint import Checkpoint, save_sharded, together
from cs336_systems.parallel.unit import ShardRange

#: single: one device. ddp: an all-reduce a gradient, during the backward pass. ddp-bucketed: an all-reduce a bucket.
#: ddp+sharded-optimizer: ddp-bucketed, and each process updates a share of the parameters. fsdp: weights, gradients and
#: optimizer state sharded, by us. torch-fsdp2: the same by PyTorch.
StrategyName = Literal["single", "ddp", "ddp-bucketed", "ddp+sharded-optimizer", "fsdp", "torch-fsdp2"]


@dataclass(frozen=True)
class StrategyOptions:
    """What strategies can be told."""

    bucket_size_mb: float | None = None
    """ddp-bucketed and ddp+sharded-optimizer: MB (2^20 bytes) of gradients in a message. None: they shrink."""
    fused_optimizer: bool = False
    """AdamW in one kernel in place of Assignment 1's, with the same state; not for torch-fsdp2."""
    compute_dtype: torch.dtype | None = None
    """fsdp and torch-fsdp2: to which weights are cast before they travel; gradients travel in it too."""


class Single(SingleDevice):
    """One device, which also reads what several have written."""

    def __init__(self, device: str, options: StrategyOptions) -> None:
        super().__init__(device)
        self.options = options

    def build_optimizer(
        self, model: nn.Module, optimizer_class: type[torch.optim.Optimizer], **options: Any
    ) -> torch.optim.Optimizer:
        return super().build_optimizer(model, _choose(optimizer_class, self.options), **options)

    def load(self, path: os.PathLike[str], model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return _load(path, model, optimizer, {})


class DDP:
    """Data parallelism with the model whole in every process."""

    def __init__(self, process: Process, options: StrategyOptions) -> None:
        self.device, self.rank, self.world_size = process.device, process.rank, process.world_size
        self.options = options

    def wrap_model(self, model: nn.Module) -> nn.Module:
        compile_by_block(model)
        return self._wrap(model.to(self.device))

    def _wrap(self, module: nn.Module) -> DataParallel:
        return OverlappedDataParallel(module)

    def build_optimizer(
        self, model: nn.Module, optimizer_class: type[torch.optim.Optimizer], **options: Any
    ) -> torch.optim.Optimizer:
        chosen = _choose(optimizer_class, self.options)
        return chosen(parameters_for(chosen, _module(model)), **options)

    def accumulate(self, model: nn.Module, *, last: bool) -> AbstractContextManager[None]:
        assert isinstance(model, DataParallel)
        return nullcontext() if last else model.no_sync()

    def step(self, model: nn.Module, optimizer: torch.optim.Optimizer, max_grad_norm: float) -> Tensor:
        assert isinstance(model, DataParallel)
        model.finish_gradient_synchronization()
        norm = model.clip_gradient(max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm

    def reduce_mean(self, value: Tensor) -> Tensor:
        mean = value.clone()
        AllReduceMean([mean]).wait()
        return mean

    def save(
        self, path: os.PathLike[str], model: nn.Module, optimizer: torch.optim.Optimizer, iteration: int, **extra: Any
    ) -> None:
        """Assignment 1's file: every process could write it, and the first one does."""
        save = partial(save_checkpoint, _module(model), optimizer, iteration, path, **extra)
        together(save if self.rank == 0 else None)

    def load(self, path: os.PathLike[str], model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return _load(path, _module(model), optimizer, self._ranges(model))

    def _ranges(self, model: nn.Module) -> Mapping[str, ShardRange]:
        """The parameters of which this process has a part."""
        return {}


class BucketedDDP(DDP):
    """The same with gradients in buckets."""

    def _wrap(self, module: nn.Module) -> DataParallel:
        return BucketedDataParallel(module, self.options.bucket_size_mb or "auto")


class _Sharded(DDP):
    """Processes that each hold something else, and write a folder together."""

    def save(
        self, path: os.PathLike[str], model: nn.Module, optimizer: torch.optim.Optimizer, iteration: int, **extra: Any
    ) -> None:
        save_sharded(path, _module(model), optimizer, self._ranges(model), iteration=iteration, **extra)


class ShardedOptimizerDDP(_Sharded, BucketedDDP):
    """Bucketed, with the optimizer's state and work shared out."""

    def build_optimizer(
        self, model: nn.Module, optimizer_class: type[torch.optim.Optimizer], **options: Any
    ) -> torch.optim.Optimizer:
        _check_elementwise(optimizer_class, "ddp+sharded-optimizer")
        return ShardedOptimizer(model.parameters(), _choose(optimizer_class, self.options), **options)


class FullySharded(_Sharded):
    """Our FSDP, a block a unit."""

    def _wrap(self, module: nn.Module) -> DataParallel:
        return FSDP(module, self.options.compute_dtype, unit_classes=(TransformerBlock, Linear, Embedding))

    def build_optimizer(
        self, model: nn.Module, optimizer_class: type[torch.optim.Optimizer], **options: Any
    ) -> torch.optim.Optimizer:
        _check_elementwise(optimizer_class, "fsdp")
        return super().build_optimizer(model, optimizer_class, **options)

    def _ranges(self, model: nn.Module) -> Mapping[str, ShardRange]:
        assert isinstance(model, FSDP)
        return model.shard_ranges()


class TorchFSDP2(_Sharded):
    """PyTorch's FSDP2 (`fully_shard`), a block a unit: the engine to grow with, beyond what this package does."""

    def wrap_model(self, model: nn.Module) -> nn.Module:
        compile_by_block(model)
        model = model.to(self.device)
        broadcast([*model.parameters(), *model.buffers()])
        mesh = init_device_mesh(self.device.type, (self.world_size,))
        policy = MixedPrecisionPolicy(param_dtype=self.options.compute_dtype)
        for block in model.modules():
            if isinstance(block, TransformerBlock):
                fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        return model

    def build_optimizer(
        self, model: nn.Module, optimizer_class: type[torch.optim.Optimizer], **options: Any
    ) -> torch.optim.Optimizer:
        _check_elementwise(optimizer_class, "torch-fsdp2")
        return optimizer_class(model.parameters(), **options)

    @contextmanager
    def accumulate(self, model: nn.Module, *, last: bool) -> Iterator[None]:
        assert isinstance(model, FSDPModule)
        model.set_requires_gradient_sync(last)
        yield

    def step(self, model: nn.Module, optimizer: torch.optim.Optimizer, max_grad_norm: float) -> Tensor:
        norm = nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def _ranges(self, model: nn.Module) -> Mapping[str, ShardRange]:
        assert isinstance(model, FSDPModule)
        model.reshard()  # after an evaluation the root's own weights are still whole
        ranges = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            assert isinstance(parameter, DTensor)
            # Process r has the r-th of world_size chunks of as many rows; the last ones are shorter.
            rows = parameter.shape[0]
            first = min(self.rank * -(-rows // self.world_size), rows)
            start = first * (parameter.numel() // max(rows, 1))
            ranges[name] = ShardRange(parameter.shape, start, start + parameter.to_local().numel())
        return ranges


#: The strategies for several processes.
PARALLEL: dict[str, type[DDP]] = {
    "ddp": DDP,
    "ddp-bucketed": BucketedDDP,
    "ddp+sharded-optimizer": ShardedOptimizerDDP,
    "fsdp": FullySharded,
    "torch-fsdp2": TorchFSDP2,
}


def compile_by_block(model: nn.Module) -> None:
    """If the model is to be compiled, compile its blocks, each by itself.

    The backward pass of a model compiled as a whole hands over all gradients at its end, and leaves nothing to overlap
    their communication with. And sharded weights come and go between the blocks, outside of what is compiled.
    """
    if isinstance(model, BasicsTransformerLM) and model._compiled_call_impl is not None:
        model._compiled_call_impl = None
        for block in model.layers.children():
            block.forward = torch.compile(block.forward, dynamic=False)


def _check_elementwise(optimizer_class: type[torch.optim.Optimizer], strategy: StrategyName) -> None:
    """Raise a ValueError if the optimizer needs whole matrices where a process may have a part."""
    if issubclass(optimizer_class, Muon):
        raise ValueError(
            f"strategy {strategy} shares out parameters, and {optimizer_class.__name__} needs gradients of whole "
            "matrices; choose ddp or ddp-bucketed, or --optimizer.name adamw"
        )


def _choose(optimizer_class: type[torch.optim.Optimizer], options: StrategyOptions) -> type[torch.optim.Optimizer]:
    if not (options.fused_optimizer and optimizer_class is AdamW):
        return optimizer_class
    from cs336_systems.adamw import FusedAdamW

    return FusedAdamW


def _module(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, DataParallel) else model


def _load(
    path: os.PathLike[str], module: nn.Module, optimizer: torch.optim.Optimizer, ranges: Mapping[str, ShardRange]
) -> dict[str, Any]:
    names = {parameter: name for name, parameter in module.named_parameters()}
    in_order = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    checkpoint = Checkpoint(path, in_order)
    checkpoint.load_model(module, ranges)
    checkpoint.load_optimizer(module, optimizer, ranges)
    return checkpoint.header
