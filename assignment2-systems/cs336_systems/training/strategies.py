"""Assignment 1's training loop on many devices. `choices.STRATEGIES` has the names of the strategies.

Each is a `cs336_basics.strategy.Strategy`, so that the loop is the same as on a laptop. Each reads the checkpoints of
all others, written by any number of ranks: a run may continue under another strategy.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from cs336_basics.checkpoint import save_checkpoint
from cs336_basics.model import Embedding, Linear, TransformerBlock
from cs336_basics.muon import Muon
from cs336_basics.optimizer import AdamW, parameters_for
from cs336_basics.strategy import SingleDevice
from cs336_systems.parallel import FSDP, BucketedDataParallel, DataParallel, OverlappedDataParallel, ShardedOptimizer
from cs336_systems.parallel.blocks import blocks_of, compile_blocks
from cs336_systems.parallel.collectives import AllReduceMean, broadcast
from cs336_systems.parallel.fsdp_unit import ShardRange
from cs336_systems.parallel.process_group import Rank
from cs336_systems.parallel.sharded_checkpoint import Checkpoint, run_on_all_ranks, save_sharded
from cs336_systems.parallel.torch_fsdp2 import fully_shard_blocks
from cs336_systems.training.choices import OPTIMIZERS, StrategyName, resolve


@dataclass(frozen=True)
class StrategyOptions:
    """Options of the strategies."""

    bucket_size_mib: float | None = None
    """MiB (2^20 bytes) of gradients in a message of ddp-bucketed and ddp+sharded-optimizer. None: buckets shrink."""
    fused_optimizer: bool = False
    """Run AdamW as one kernel instead of Assignment 1's, with the same state; not for torch-fsdp2."""
    compute_dtype: torch.dtype | None = None
    """fsdp and torch-fsdp2: to which weights are cast before they are sent; gradients are sent in it too."""


class Single(SingleDevice):
    """One device, which can also read what several ranks have written."""

    def __init__(self, device: str, options: StrategyOptions) -> None:
        super().__init__(device)
        self.options = options

    def build_optimizer(
        self, model: nn.Module, optimizer_class: type[torch.optim.Optimizer], **options: Any
    ) -> torch.optim.Optimizer:
        return super().build_optimizer(model, _fused_if_asked(optimizer_class, self.options), **options)

    def load(self, path: os.PathLike[str], model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return _load(path, model, optimizer, {})


class DDP:
    """Data parallelism with the full model on every rank."""

    def __init__(self, rank: Rank, options: StrategyOptions) -> None:
        self.device, self.rank, self.world_size = rank.device, rank.rank, rank.world_size
        self.options = options

    def wrap_model(self, model: nn.Module) -> nn.Module:
        compile_blocks_instead(model)
        return self._wrap(model.to(self.device))

    def _wrap(self, module: nn.Module) -> DataParallel:
        return OverlappedDataParallel(module)

    def build_optimizer(
        self, model: nn.Module, optimizer_class: type[torch.optim.Optimizer], **options: Any
    ) -> torch.optim.Optimizer:
        chosen = _fused_if_asked(optimizer_class, self.options)
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
        """Write Assignment 1's file; every rank could, and rank 0 does."""
        save = partial(save_checkpoint, _module(model), optimizer, iteration, path, **extra)
        run_on_all_ranks(save if self.rank == 0 else None)

    def load(self, path: os.PathLike[str], model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return _load(path, _module(model), optimizer, self._ranges(model))

    def _ranges(self, model: nn.Module) -> Mapping[str, ShardRange]:
        """Return the parameters of which this rank has only a part."""
        return {}


class BucketedDDP(DDP):
    """Data parallelism with gradients in buckets."""

    def _wrap(self, module: nn.Module) -> DataParallel:
        return BucketedDataParallel(module, self.options.bucket_size_mib or "auto")


class _Sharded(DDP):
    """Ranks that each hold a different share, and write a checkpoint folder together."""

    def save(
        self, path: os.PathLike[str], model: nn.Module, optimizer: torch.optim.Optimizer, iteration: int, **extra: Any
    ) -> None:
        save_sharded(path, _module(model), optimizer, self._ranges(model), iteration=iteration, **extra)


class ShardedOptimizerDDP(_Sharded, BucketedDDP):
    """Bucketed data parallelism with the optimizer's state and work sharded."""

    def build_optimizer(
        self, model: nn.Module, optimizer_class: type[torch.optim.Optimizer], **options: Any
    ) -> torch.optim.Optimizer:
        _check_elementwise(optimizer_class, "ddp+sharded-optimizer")
        return ShardedOptimizer(model.parameters(), _fused_if_asked(optimizer_class, self.options), **options)


class FullySharded(_Sharded):
    """Our FSDP, with each block as a unit."""

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
    """PyTorch's FSDP2 (`fully_shard`), with each block as a unit: to use beyond what this package does."""

    def wrap_model(self, model: nn.Module) -> nn.Module:
        compile_blocks_instead(model)
        model = model.to(self.device)
        broadcast([*model.parameters(), *model.buffers()])
        fully_shard_blocks(model, self.device, self.world_size, self.options.compute_dtype)
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
        model.reshard()  # after an evaluation the root's own weights are still unsharded
        ranges = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            assert isinstance(parameter, DTensor)
            # Rank r has the r-th of world_size chunks of equally many rows; the last ones are shorter.
            rows = parameter.shape[0]
            first = min(self.rank * -(-rows // self.world_size), rows)
            start = first * (parameter.numel() // max(rows, 1))
            ranges[name] = ShardRange(parameter.shape, start, start + parameter.to_local().numel())
        return ranges


def compile_blocks_instead(model: nn.Module) -> None:
    """Compile the blocks of a model one by one if the training loop has asked to compile it as a whole."""
    blocks = blocks_of(model)
    if blocks and model._compiled_call_impl is not None:
        model._compiled_call_impl = None
        compile_blocks(*blocks)


def _check_elementwise(optimizer_class: type[torch.optim.Optimizer], strategy: StrategyName) -> None:
    """Raise a ValueError unless the optimizer updates every element by itself: a rank may have a part of a matrix."""
    if issubclass(optimizer_class, Muon):
        raise ValueError(
            f"strategy {strategy} shards parameters, and {optimizer_class.__name__} needs gradients of full "
            "matrices; choose ddp or ddp-bucketed, or --optimizer.name adamw"
        )


def _fused_if_asked(
    optimizer_class: type[torch.optim.Optimizer], options: StrategyOptions
) -> type[torch.optim.Optimizer]:
    return resolve(OPTIMIZERS, "fused") if options.fused_optimizer and optimizer_class is AdamW else optimizer_class


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
