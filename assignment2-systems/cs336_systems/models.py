"""The model sizes of the assignment (Radford et al. 2019, table 2, and one of 2.7 billion parameters)."""

from dataclasses import replace
from typing import Literal

from cs336_basics.model import ModelConfig

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
