"""The models of the assignment: sizes (Radford et al. 2019, table 2, and one of 2.7 billion parameters) and blocks."""

from dataclasses import replace
from typing import Literal

from torch import nn

from cs336_basics.model import BasicsTransformerLM, ModelConfig

SizeName = Literal["tiny", "small", "medium", "large", "xl", "2.7B"]
VOCAB_SIZE = 10_000

#: Name -> shape at a context of 1024 tokens. With tiny, which is ours, commands can be tried on a CPU.
MODELS: dict[SizeName, ModelConfig] = {
    "tiny": ModelConfig(512, 1024, d_model=64, d_ff=192, num_layers=4, num_heads=4),
    "small": ModelConfig(VOCAB_SIZE, 1024, d_model=768, d_ff=3072, num_layers=12, num_heads=12),
    "medium": ModelConfig(VOCAB_SIZE, 1024, d_model=1024, d_ff=4096, num_layers=24, num_heads=16),
    "large": ModelConfig(VOCAB_SIZE, 1024, d_model=1280, d_ff=5120, num_layers=36, num_heads=20),
    "xl": ModelConfig(VOCAB_SIZE, 1024, d_model=1600, d_ff=6400, num_layers=48, num_heads=25),
    "2.7B": ModelConfig(VOCAB_SIZE, 1024, d_model=2560, d_ff=10240, num_layers=32, num_heads=32),
}


def model_config(size: SizeName, context: int) -> ModelConfig:
    """The shape of that size, for sequences of `context` tokens."""
    return replace(MODELS[size], context_length=context)


def blocks_of(model: BasicsTransformerLM) -> list[nn.Module]:
    """The blocks themselves, whatever strategy of checkpointing they run under."""
    return list(model.layers.children())


def compile_blocks(model: BasicsTransformerLM, backend: str = "inductor") -> None:
    """Compile each block of a model for itself; as they have the same code, they are compiled only once.

    Containers hook into the modules, around what is compiled.
    """
    import torch._dynamo

    # Else a block within PyTorch's container is cut in pieces of its buckets' size, and is no longer the same code.
    torch._dynamo.config.optimize_ddp = False
    for block in blocks_of(model):
        block.forward = torch.compile(block.forward, backend=backend)
