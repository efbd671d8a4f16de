"""PyTorch's own FSDP2, each block of a Transformer a unit: the only place here that calls `fully_shard`."""

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from cs336_systems.parallel.blocks import blocks_of


def fully_shard_blocks(
    model: nn.Module, device: torch.device, world_size: int, compute_dtype: torch.dtype | None = None
) -> None:
    """Shard every block of a model, in place, and the rest of the model as one more unit.

    Args:
        model: on its device, with the same weights on all ranks.
        device, world_size: of the group of all ranks.
        compute_dtype: to which weights are cast before they are gathered; gradients are averaged in it too. None: no
            casts.
    """
    mesh = init_device_mesh(device.type, (world_size,))
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype)
    for module in (*blocks_of(model), model):
        fully_shard(module, mesh=mesh, mp_policy=policy)


def local_part(tensor: Tensor) -> Tensor:
    """The part of a DTensor that this rank holds, in the same memory; any other tensor is returned as it is."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
