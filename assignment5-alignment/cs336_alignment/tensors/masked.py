"""Means and sums over the entries that a mask lets through.

What the mask keeps out is replaced, not multiplied by zero: an infinity or a NaN there changes neither the value nor
the gradient.
"""

from jaxtyping import Num, Shaped
from torch import Tensor


def masked_mean(
    tensor: Num[Tensor, "*shape"], mask: Shaped[Tensor, "*shape"], dim: int | None = None
) -> Num[Tensor, "..."]:
    """The mean of the masked entries along `dim`, of all of them if it is None; shapes are as of `tensor.mean(dim)`.

    Args:
        mask: True (or 1) where an entry counts.

    Returns:
        NaN, 0/0, where no entry counts.
    """
    return masked_normalize(tensor, mask, dim) / mask.bool().sum(dim)


def masked_normalize(
    tensor: Num[Tensor, "*shape"],
    mask: Shaped[Tensor, "*shape"],
    dim: int | None = None,
    normalize_constant: float = 1.0,
) -> Num[Tensor, "..."]:
    """The sum of the masked entries along `dim`, of all of them if it is None, over a constant.

    Args:
        mask: True (or 1) where an entry counts.
    """
    return tensor.masked_fill(~mask.bool(), 0).sum(dim) / normalize_constant
