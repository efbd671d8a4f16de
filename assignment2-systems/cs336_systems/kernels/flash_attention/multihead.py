"""Attention for a Transformer, and a stand-in for the Triton kernels on a machine without Triton."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import Function

try:
    from cs336_systems.kernels.flash_attention.triton_ops import FlashAttentionTriton
except ModuleNotFoundError as error:
    if error.name != "triton":
        raise

    class FlashAttentionTriton(Function):  # type: ignore[no-redef]
        """Raise an error, because Triton is not installed; it exists for Linux only."""

        @staticmethod
        def forward(ctx: object, Q: Tensor, K: Tensor, V: Tensor, is_causal: bool = False) -> Tensor:
            raise ValueError("FlashAttentionTriton needs Triton, which is not installed: use FlashAttentionPyTorch")


def flash_attention(
    q: Float[Tensor, "... heads queries d"],
    k: Float[Tensor, "... kv_heads keys d"],
    v: Float[Tensor, "... kv_heads keys d"],
    is_causal: bool = True,
) -> Float[Tensor, "... heads queries d"]:
    """Compute attention of many heads on a GPU; fits `causal_attention` of Assignment 1's model.

    If there are fewer heads of keys and values than of queries, each serves a group of queries (Ainslie et al. 2023).
    Under autocast q, k and v are cast to its dtype, as in PyTorch's own attention. The mask counts from the first key:
    a single query with n keys, as in decoding with a KV cache, sees only key 0; pass is_causal=False there. See
    `FlashAttentionTriton`.
    """
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    return FlashAttentionTriton.apply(q, k, v, is_causal)
