"""Making a language model fast: FlashAttention-2 in Triton, fused kernels, and the instruments to measure them."""
