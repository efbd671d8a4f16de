"""Checks of the inputs of attention, for all implementations here."""

import torch
from torch import Tensor


def check_inputs(Q: Tensor, K: Tensor, V: Tensor, grouped: bool = False) -> None:
    """Check that Q is [... n_queries d] and K and V are [... n_keys d], of one floating dtype and on one device.

    With `grouped`, Q [... heads n_queries d] may have a multiple of the heads of K and V. The types are plain
    `Tensor`s because this function is the check.

    Raises:
        ValueError: they are not; the message names the values and what would be right.
    """
    for name, tensor in (("Q", Q), ("K", K), ("V", V)):
        if tensor.dim() < 2:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, but attention needs [... sequence d]: "
                "give it the missing dimensions with unsqueeze"
            )
        if not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}, but attention needs a floating dtype: cast it with .to()")
    if not Q.dtype == K.dtype == V.dtype:
        raise ValueError(f"Q, K and V are {Q.dtype}, {K.dtype} and {V.dtype}: cast them to one dtype with .to()")
    if not Q.device == K.device == V.device:
        raise ValueError(f"Q, K and V are on {Q.device}, {K.device} and {V.device}: move them to one device with .to()")
    if not Q.shape[-1] == K.shape[-1] == V.shape[-1] or Q.shape[-1] == 0:
        raise ValueError(
            f"the last dimensions of Q, K and V are {Q.shape[-1]}, {K.shape[-1]} and {V.shape[-1]}, "
            "but must be the same and at least 1: project them to the same width"
        )
    if K.shape[-2] != V.shape[-2]:
        raise ValueError(
            f"K has {K.shape[-2]} keys, but V has {V.shape[-2]} values: pass as many values as keys "
            "(the second-to-last dimension)"
        )
    expected = Q.shape[:-2]
    if grouped and Q.dim() == K.dim() > 2 and K.shape[-3] != Q.shape[-3]:
        heads, kv_heads = Q.shape[-3], K.shape[-3]
        if kv_heads == 0 or heads % kv_heads:
            raise ValueError(
                f"Q has {heads} heads, which is not a multiple of the {kv_heads} heads of K and V: choose a multiple"
            )
        expected = torch.Size((*Q.shape[:-3], kv_heads))
    if not expected == K.shape[:-2] == V.shape[:-2]:
        raise ValueError(
            f"the leading dimensions of Q, K and V are {tuple(Q.shape[:-2])}, {tuple(K.shape[:-2])} and "
            f"{tuple(V.shape[:-2])}, but must be equal: expand them; they are not broadcast"
        )
