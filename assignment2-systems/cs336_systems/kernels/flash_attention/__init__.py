"""FlashAttention-2 (Dao 2023): exact attention whose memory grows with the length, not with its square.

`reference` says what is computed, in plain PyTorch; `triton_kernels` computes it on a GPU, `triton_ops` launches
that; `multihead` is what a Transformer calls.
"""

from cs336_systems.kernels.flash_attention.multihead import FlashAttentionTriton, flash_attention
from cs336_systems.kernels.flash_attention.reference import FlashAttentionPyTorch

__all__ = ["FlashAttentionPyTorch", "FlashAttentionTriton", "flash_attention"]
