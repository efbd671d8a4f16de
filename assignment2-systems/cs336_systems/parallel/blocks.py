"""The blocks of a model, and compiling them one by one."""

from typing import Any

import torch
import torch._dynamo
from torch import nn

from cs336_basics.model import TransformerBlock


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the Transformer blocks of a model in order, whether or not they run under a gradient checkpoint."""
    return [module for module in model.modules() if isinstance(module, TransformerBlock)]


def compile_blocks(*modules: nn.Module, **options: Any) -> None:
    """Compile each of these modules by itself, in place; blocks, which have the same code, are compiled only once.

    Containers hook into the modules, around the code that is compiled. A model compiled as a whole would hand over all
    gradients at the end of its backward pass and leave nothing to overlap their communication with; and sharded weights
    come and go between the blocks, outside of what is compiled.

    Args:
        modules: changed in place; the names in the state dict stay.
        options: of torch.compile, for example a backend.
    """
    # Otherwise Dynamo cuts a block within PyTorch's DDP into pieces of its buckets' size, and compiles each of them.
    torch._dynamo.config.optimize_ddp = False
    for module in modules:
        module.forward = torch.compile(module.forward, dynamic=False, **options)
