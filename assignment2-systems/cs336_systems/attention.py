"""Causal attention by name: ours, plain and fused, and PyTorch's fused kernels to compare with.

Each fits the seam of Assignment 1's model: [... heads seq d_head] queries, keys, values in, the same out.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as torch_attention

from cs336_basics.model import CausalAttention, scaled_dot_product_attention
from cs336_systems.flash_attention import FlashAttentionPyTorch, flash_attention

#: plain: Assignment 1's explicit scores and softmax. flash: our Triton kernels. flash-pytorch: their tiled
#: reference. sdpa-*: PyTorch's fused kernels (FlashAttention-2 and cuDNN, for 16-bit numbers, and the memory-efficient
#: one, for float32 too). flex: FlexAttention, compiled.
AttentionName = Literal["plain", "flash", "flash-pytorch", "sdpa-flash", "sdpa-cudnn", "sdpa-efficient", "flex"]


#: Queries and keys of a block of FlexAttention's mask.
FLEX_BLOCK = 128


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


def _flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _compiled_flex()(q, k, v, block_mask=_causal_block_mask(q.shape[-2], k.shape[-2], q.device))


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


@functools.cache
def _causal_block_mask(n_queries: int, n_keys: int, device: torch.device) -> Any:
    """The blocks of causal attention, written down: `create_block_mask` makes the whole square to find them.

    Row i of 128 queries needs a mask in block i of the keys, and sees those before it in full.
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


_IMPLEMENTATIONS: dict[str, CausalAttention] = {
    "plain": _plain,
    "flash": flash_attention,
    "flash-pytorch": lambda q, k, v: FlashAttentionPyTorch.apply(q, k, v, True),
    "sdpa-flash": _torch(SDPBackend.FLASH_ATTENTION),
    "sdpa-cudnn": _torch(SDPBackend.CUDNN_ATTENTION),
    "sdpa-efficient": _torch(SDPBackend.EFFICIENT_ATTENTION),
    "flex": _flex,
}
