"""The model sizes of the assignment (Radford et al. 2019, table 2, and one of 2.7 billion parameters)."""

from cs336_basics.model import ModelConfig

VOCAB_SIZE = 10_000
CONTEXT_LENGTHS = (128, 256, 512, 1024)

#: Name -> shape at a context of 1024 tokens; `dataclasses.replace` changes the context.
MODELS: dict[str, ModelConfig] = {
    "small": ModelConfig(VOCAB_SIZE, 1024, d_model=768, d_ff=3072, num_layers=12, num_heads=12),
    "medium": ModelConfig(VOCAB_SIZE, 1024, d_model=1024, d_ff=4096, num_layers=24, num_heads=16),
    "large": ModelConfig(VOCAB_SIZE, 1024, d_model=1280, d_ff=5120, num_layers=36, num_heads=20),
    "xl": ModelConfig(VOCAB_SIZE, 1024, d_model=1600, d_ff=6400, num_layers=48, num_heads=25),
    "2.7B": ModelConfig(VOCAB_SIZE, 1024, d_model=2560, d_ff=10240, num_layers=32, num_heads=32),
}
