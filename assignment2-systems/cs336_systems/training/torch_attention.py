"""Plain causal attention, and PyTorch's fused kernels to compare with; `choices.ATTENTIONS` has their names.

All of them fit the seam of Assignment 1's model: [... heads seq d_head] queries, keys and values -> the same shape.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as torch_attention

from cs336_basics.model import scaled_dot_product_attention
from cs336_systems.kernels.flash_attention import FlashAttentionPyTorch

#: Queries and keys of a block of FlexAttention's mask.
FLEX_BLOCK = 128


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Assignment 1's attention: explicit scores, mask and softmax."""
    mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    return scaled_dot_product_attention(q, k, v, mask)


def flash_pytorch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """FlashAttention-2 in plain PyTorch, the reference of our kernels."""
    return FlashAttentionPyTorch.apply(q, k, v, True)


def sdpa_flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's FlashAttention-2."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return torch_attention(q, k, v, is_causal=True)


def sdpa_cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's cuDNN attention."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return torch_attention(q, k, v, is_causal=True)


def sdpa_efficient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's memory-efficient attention."""
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        return torch_attention(q, k, v, is_causal=True)


def flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's FlexAttention, compiled."""
    return _compiled_flex()(q, k, v, block_mask=_causal_block_mask(q.shape[-2], k.shape[-2], q.device))


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


@functools.cache
def _causal_block_mask(n_queries: int, n_keys: int, device: torch.device) -> Any:
    """Build the block mask of causal attention directly: `create_block_mask` would make the full score mask first.

    Row i of 128 queries needs a mask in block i of the keys, and sees the blocks before it in full.
    """
    from torch.nn.attention.flex_attention import BlockMask

    rows, columns = (-(-n // FLEX_BLOCK) for n in (n_queries, n_keys))
    row = torch.arange(rows, device=device, dtype=torch.int32)
    diagonal = torch.zeros(1, 1, rows, columns, device=device, dtype=torch.int32)
    diagonal[..., 0] = row.clamp(max=columns - 1)
    before = torch.arange(columns, device=device, dtype=torch.int32).expand(1, 1, rows, columns).contiguous()

    def causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query >= key

    return BlockMask.from_kv_blocks(
        (row < columns).int()[None, None], diagonal, row.clamp(max=columns)[None, None], before,
        BLOCK_SIZE=FLEX_BLOCK, mask_mod=causal, seq_lengths=(n_queries, n_keys),
    )  # fmt: skip
