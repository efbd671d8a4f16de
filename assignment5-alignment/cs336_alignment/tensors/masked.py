"""Means and sums over the entries that a mask selects.

Other entries are replaced by zero instead of multiplied by it, so an infinity or a NaN there changes neither the value
nor the gradient.
"""

from jaxtyping import Num, Shaped
from torch import Tensor


def masked_mean(
    tensor: Num[Tensor, "*shape"], mask: Shaped[Tensor, "*shape"], dim: int | None = None
) -> Num[Tensor, "..."]:
    """Average the masked entries along `dim`, or all of them if it is None; shapes are those of `tensor.mean(dim)`.

    Args:
        mask: True (or 1) where an entry counts.

    Returns:
        The means; NaN, as 0/0, where no entry counts.
    """
    return masked_normalize(tensor, mask, dim) / mask.bool().sum(dim)


def masked_normalize(
    tensor: Num[Tensor, "*shape"],
    mask: Shaped[Tensor, "*shape"],
    dim: int | None = None,
    normalize_constant: float = 1.0,
) -> Num[Tensor, "..."]:
    """Sum the masked entries along `dim`, or all of them if it is None, and divide by a constant.

    Args:
        mask: True (or 1) where an entry counts.
    """
    return tensor.masked_fill(~mask.bool(), 0).sum(dim) / normalize_constant
