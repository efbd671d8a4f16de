"""FlashAttention-2 (Dao 2023): exact attention whose memory grows linearly with the sequence length.

reference         the algorithm in plain PyTorch: read this first
triton_kernels    the same algorithm on a GPU
triton_ops        launches the kernels: tile sizes, torch.compile, autograd
multihead         the function that a Transformer calls
shapes            checks of the inputs
"""

from cs336_systems.kernels.flash_attention.multihead import FlashAttentionTriton, flash_attention
from cs336_systems.kernels.flash_attention.reference import FlashAttentionPyTorch

__all__ = ["FlashAttentionPyTorch", "FlashAttentionTriton", "flash_attention"]
