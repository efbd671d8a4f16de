"""Causal attention by name: ours, plain and fused, and PyTorch's fused kernels to compare with.

Each fits the seam of Assignment 1's model: [... heads seq d_head] queries, keys, values in, the same out.
"""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as torch_attention

from cs336_basics.model import CausalAttention, scaled_dot_product_attention
from cs336_systems.flash_attention import FlashAttentionPyTorch, flash_attention

#: plain: Assignment 1's explicit scores and softmax. flash: our Triton kernels. flash-pytorch: their tiled
#: reference. sdpa-*: PyTorch's fused kernels (FlashAttention-2 and cuDNN).
AttentionName = Literal["plain", "flash", "flash-pytorch", "sdpa-flash", "sdpa-cudnn"]
ATTENTION_NAMES: tuple[str, ...] = get_args(AttentionName)


def causal_attention(name: AttentionName) -> CausalAttention:
    """The attention of that name."""
    return _IMPLEMENTATIONS[name]


def _plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    return scaled_dot_product_attention(q, k, v, mask)


def _torch(backend: SDPBackend) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return torch_attention(q, k, v, is_causal=True)

    return attend


_IMPLEMENTATIONS: dict[str, CausalAttention] = {
    "plain": _plain,
    "flash": flash_attention,
    "flash-pytorch": lambda q, k, v: FlashAttentionPyTorch.apply(q, k, v, True),
    "sdpa-flash": _torch(SDPBackend.FLASH_ATTENTION),
    "sdpa-cudnn": _torch(SDPBackend.CUDNN_ATTENTION),
}
