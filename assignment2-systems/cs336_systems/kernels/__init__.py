"""Triton kernels, each in a module that opens with the formula and its sources, and has a reference in PyTorch.

flash_attention         FlashAttention-2: a readable reference, the kernels, and how they are launched
adamw                   AdamW over all parameters in one launch
linear_cross_entropy    the language-model head and its loss without holding all logits
rms_norm                RMSNorm, an exhibit that no training step uses
triton_support          where the kernels can run
"""
