"""The ways in which several ranks train one model in a measured step; `choices.CONTAINERS` has their names."""

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cs336_basics.model import Embedding, Linear, TransformerBlock
from cs336_systems.parallel import (
    FSDP,
    BucketedDataParallel,
    FlatDataParallel,
    NaiveDataParallel,
    OverlappedDataParallel,
)
from cs336_systems.parallel.process_group import Rank
from cs336_systems.parallel.torch_fsdp2 import fully_shard_blocks

if TYPE_CHECKING:
    from cs336_systems.training.step import StepConfig


class HeadWithLoss(nn.Module):
    """The output head and the loss as one module, so that FSDP gathers the head's weight for both.

    Args:
        lm_head: the linear map from hidden states to logits.
        loss: the mean loss, from hidden states, the head's weight and targets.
    """

    def __init__(self, lm_head: Linear, loss: Any) -> None:
        super().__init__()
        self.lm_head = lm_head
        self.loss = loss

    def forward(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return self.loss(hidden, self.lm_head.weight, targets)


def none(model: nn.Module, config: "StepConfig", rank: Rank) -> nn.Module:
    """No communication: every rank trains a model of its own."""
    return model


def naive(model: nn.Module, config: "StepConfig", rank: Rank) -> nn.Module:
    """One all-reduce per gradient, after the backward pass."""
    return NaiveDataParallel(model)


def flat(model: nn.Module, config: "StepConfig", rank: Rank) -> nn.Module:
    """One all-reduce of all gradients, after the backward pass."""
    return FlatDataParallel(model)


def overlapped(model: nn.Module, config: "StepConfig", rank: Rank) -> nn.Module:
    """One all-reduce per gradient, during the backward pass."""
    return OverlappedDataParallel(model)


def bucketed(model: nn.Module, config: "StepConfig", rank: Rank) -> nn.Module:
    """One all-reduce per bucket, during the backward pass."""
    return BucketedDataParallel(model, config.bucket_mib)


def torch_ddp(model: nn.Module, config: "StepConfig", rank: Rank) -> nn.Module:
    """PyTorch's DistributedDataParallel."""
    # The only buffers are tables of positions: no need to send them before every step. (Renamed in torch 2.13.)
    names = inspect.signature(DistributedDataParallel).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    options: dict[str, Any] = {buffers: False}
    if rank.device.type == "cuda":
        options["device_ids"] = [rank.device]
    if config.bucket_mib != "auto":
        options["bucket_cap_mb"] = config.bucket_mib
    return DistributedDataParallel(model, gradient_as_bucket_view=True, **options)


def fsdp(model: nn.Module, config: "StepConfig", rank: Rank) -> nn.Module:
    """Our FSDP with a block as a unit; head and loss form one as well, if they are one module."""
    head = HeadWithLoss if config.loss != "plain" else Linear
    return FSDP(model, config.sharded_dtype, (TransformerBlock, head, Embedding))


def fsdp_linear(model: nn.Module, config: "StepConfig", rank: Rank) -> nn.Module:
    """Our FSDP with every Linear and Embedding as a unit."""
    return FSDP(model, config.sharded_dtype)


def fully_shard(model: nn.Module, config: "StepConfig", rank: Rank) -> nn.Module:
    """PyTorch's FSDP2 with a block as a unit."""
    fully_shard_blocks(model, rank.device, rank.world_size, config.sharded_dtype)
    return model
