"""What the course's tests call: thin shims over the library."""

from torch.autograd import Function

from cs336_systems.flash_attention import FlashAttentionPyTorch, FlashAttentionTriton


def get_flashattention_autograd_function_pytorch() -> type[Function]:
    return FlashAttentionPyTorch


def get_flashattention_autograd_function_triton() -> type[Function]:
    return FlashAttentionTriton
