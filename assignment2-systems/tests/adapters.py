"""What the course's tests call: thin shims over the library. The course's two editions name some things differently."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from cs336_systems.kernels.flash_attention import FlashAttentionPyTorch, FlashAttentionTriton
from cs336_systems.parallel import FSDP, BucketedDataParallel, OverlappedDataParallel, ShardedOptimizer


def get_flashattention_autograd_function_pytorch() -> type[Function]:
    return FlashAttentionPyTorch


def get_flashattention_autograd_function_triton() -> type[Function]:
    return FlashAttentionTriton


def get_ddp_individual_parameters(module: nn.Module) -> nn.Module:
    return OverlappedDataParallel(module)


def ddp_individual_parameters_on_after_backward(
    ddp_model: OverlappedDataParallel, optimizer: torch.optim.Optimizer
) -> None:
    ddp_model.finish_gradient_synchronization()


def get_ddp(module: nn.Module) -> nn.Module:
    return OverlappedDataParallel(module)


def ddp_on_after_backward(ddp_model: OverlappedDataParallel, optimizer: torch.optim.Optimizer) -> None:
    ddp_model.finish_gradient_synchronization()


def get_ddp_bucketed(module: nn.Module, bucket_size_mb: float | None) -> nn.Module:
    return BucketedDataParallel(module, bucket_size_mb)


def ddp_bucketed_on_after_backward(ddp_model: BucketedDataParallel, optimizer: torch.optim.Optimizer) -> None:
    ddp_model.finish_gradient_synchronization()


def ddp_bucketed_on_train_batch_start(ddp_model: BucketedDataParallel, optimizer: torch.optim.Optimizer) -> None:
    pass  # everything is ready for the next batch when the last one is finished


def get_fsdp(module: nn.Module, compute_dtype: torch.dtype | None = None) -> nn.Module:
    return FSDP(module, compute_dtype)


def fsdp_on_after_backward(fsdp_model: FSDP, optimizer: torch.optim.Optimizer) -> None:
    fsdp_model.finish_gradient_synchronization()


def fsdp_gather_full_params(fsdp_model: FSDP) -> dict[str, Tensor]:
    return fsdp_model.gather_full_params()


def get_sharded_optimizer(
    params: Iterable[Tensor], optimizer_cls: type[torch.optim.Optimizer], **kwargs: Any
) -> torch.optim.Optimizer:
    return ShardedOptimizer(params, optimizer_cls, **kwargs)
