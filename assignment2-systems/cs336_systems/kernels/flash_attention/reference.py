"""FlashAttention-2 in plain PyTorch: Algorithms 1 and 2 of Dao 2023 (arXiv 2307.08691), tile by tile.

Attention needs the scores of all queries with all keys, but never all at the same time. The forward pass goes over the
keys in tiles and keeps, for each query, the maximum m of the scores so far, the sum l of the exponentials of the scores
minus that maximum, and the weighted sum of values; a new maximum rescales the earlier sums. The backward pass computes
the scores again, tile by tile, from one number per query that the forward pass has kept: L, the log-sum-exp of its
scores. Memory grows linearly with the sequence length.

This file is meant to be read, and the Triton kernels are checked against it. It runs on every device. It masks and
rounds where the kernels do; they differ in tile sizes, and compute dQ in a separate loop. As on tensor cores, the
operands of a matmul have the inputs' dtype, and sums are kept in float32 (float64 for float64 inputs).
"""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from cs336_systems.kernels.flash_attention.shapes import check_inputs


def flash_forward(
    Q: Float[Tensor, "*batch queries d"],
    K: Float[Tensor, "*batch keys d"],
    V: Float[Tensor, "*batch keys d"],
    is_causal: bool = False,
    query_tile: int = 64,
    key_tile: int = 64,
) -> tuple[Float[Tensor, "*batch queries d"], Float[Tensor, "*batch queries"]]:
    """Compute softmax(Q Kᵀ / √d) V and the log-sum-exp of the scores (Algorithm 1).

    Args:
        Q: queries.
        K: keys, any number of them.
        V: one value per key.
        is_causal: query i attends only to the keys j ≤ i, even if there are more or fewer keys than queries.
        query_tile: B_r of the paper, queries per tile.
        key_tile: B_c of the paper, keys per tile.

    Returns:
        The output O in the inputs' dtype, and L in float32 (float64 for float64): the natural logarithm of
        Σ_j exp(Q_i · K_j / √d). Without any key O is 0 and L is -∞.
    """
    n_queries, n_keys = Q.shape[-2], K.shape[-2]
    wide = _accumulator_dtype(Q)
    O = torch.empty(Q.shape, dtype=Q.dtype, device=Q.device)
    L = torch.empty(Q.shape[:-1], dtype=wide, device=Q.device)

    for i in range(0, n_queries, query_tile):
        Q_i = Q[..., i : i + query_tile, :]
        O_i = torch.zeros(Q_i.shape, dtype=wide, device=Q.device)
        l_i = torch.zeros(Q_i.shape[:-1], dtype=wide, device=Q.device)
        m_i = torch.full(Q_i.shape[:-1], -torch.inf, dtype=wide, device=Q.device)

        # Skip key tiles that begin after the last query of this tile: they are masked entirely.
        visible_keys = min(n_keys, i + query_tile) if is_causal else n_keys
        for j in range(0, visible_keys, key_tile):
            K_j, V_j = K[..., j : j + key_tile, :], V[..., j : j + key_tile, :]
            S_ij = _scores(Q_i, K_j, i, j, is_causal)
            # Every query sees key 0, so its maximum is finite from the first tile on, and ∞ - ∞ cannot occur in a
            # later tile of which it sees nothing.
            m_new = torch.maximum(m_i, S_ij.amax(dim=-1))
            P_ij = torch.exp(S_ij - m_new[..., None])
            rescale = torch.exp(m_i - m_new)
            l_i = rescale * l_i + P_ij.sum(dim=-1)
            O_i = rescale[..., None] * O_i + _matmul(P_ij.to(V.dtype), V_j)
            m_i = m_new

        # A sum of 0 means that there are no keys: O_i stays 0, and L = -∞ + log 0 = -∞.
        O[..., i : i + query_tile, :] = (O_i / torch.where(l_i > 0, l_i, 1.0)[..., None]).to(O.dtype)
        L[..., i : i + query_tile] = m_i + torch.log(l_i)
    return O, L


def flash_backward(
    Q: Float[Tensor, "*batch queries d"],
    K: Float[Tensor, "*batch keys d"],
    V: Float[Tensor, "*batch keys d"],
    O: Float[Tensor, "*batch queries d"],
    L: Float[Tensor, "*batch queries"],
    dO: Float[Tensor, "*batch queries d"],
    is_causal: bool = False,
    query_tile: int = 64,
    key_tile: int = 64,
) -> tuple[Float[Tensor, "*batch queries d"], Float[Tensor, "*batch keys d"], Float[Tensor, "*batch keys d"]]:
    """Compute the gradients of Q, K and V, in their dtype, from that of O (Algorithm 2).

    Args: the arguments of `flash_forward`, its results O and L, and the gradient dO of its output.
    """
    n_queries, n_keys, d = Q.shape[-2], K.shape[-2], Q.shape[-1]
    wide = _accumulator_dtype(Q)
    dQ = torch.zeros(Q.shape, dtype=wide, device=Q.device)  # summed over the key tiles of the outer loop
    dK, dV = (torch.empty(K.shape, dtype=K.dtype, device=K.device) for _ in range(2))
    # The softmax's gradient needs Σ_j P_ij dP_ij, a sum over all keys. It equals dO_i · O_i.
    D = (O.to(wide) * dO.to(wide)).sum(dim=-1)

    for j in range(0, n_keys, key_tile):
        K_j, V_j = K[..., j : j + key_tile, :], V[..., j : j + key_tile, :]
        dK_j, dV_j = (torch.zeros(K_j.shape, dtype=wide, device=K.device) for _ in range(2))

        # Skip query tiles that end before this tile's first key: they see nothing of it.
        first_query = j // query_tile * query_tile if is_causal else 0
        for i in range(first_query, n_queries, query_tile):
            Q_i, dO_i = Q[..., i : i + query_tile, :], dO[..., i : i + query_tile, :]
            L_i, D_i = L[..., i : i + query_tile, None], D[..., i : i + query_tile, None]
            P_ij = torch.exp(_scores(Q_i, K_j, i, j, is_causal) - L_i)
            dV_j += _matmul(P_ij.to(dO.dtype).mT, dO_i)
            dP_ij = _matmul(dO_i, V_j.mT)
            dS_ij = (P_ij * (dP_ij - D_i)).to(Q.dtype)
            dQ[..., i : i + query_tile, :] += _matmul(dS_ij, K_j)
            dK_j += _matmul(dS_ij.mT, Q_i)

        dK[..., j : j + key_tile, :] = (dK_j / math.sqrt(d)).to(K.dtype)
        dV[..., j : j + key_tile, :] = dV_j.to(V.dtype)
    return (dQ / math.sqrt(d)).to(Q.dtype), dK, dV


class FlashAttentionPyTorch(torch.autograd.Function):
    """`flash_forward` and `flash_backward` for autograd: `FlashAttentionPyTorch.apply(Q, K, V, is_causal=False)`.

    Q is [... n_queries d], K and V are [... n_keys d], and the result is [... n_queries d]. Q, K, V, O and L are saved
    for the backward pass, and nothing of size n_queries x n_keys.
    """

    @staticmethod
    def forward(ctx: Any, Q: Tensor, K: Tensor, V: Tensor, is_causal: bool = False) -> Tensor:
        check_inputs(Q, K, V)
        with _full_precision(Q):
            O, L = flash_forward(Q, K, V, is_causal)
        ctx.save_for_backward(Q, K, V, O, L)
        ctx.is_causal = is_causal
        return O

    @staticmethod
    def backward(ctx: Any, dO: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        if torch.is_grad_enabled():  # L is not an output of the graph, so a second derivative would miss its part
            raise RuntimeError("FlashAttentionPyTorch has no second derivatives: leave out create_graph=True")
        Q, K, V, O, L = ctx.saved_tensors
        with _full_precision(Q):
            dQ, dK, dV = flash_backward(Q, K, V, O, L, dO, ctx.is_causal)
        return dQ, dK, dV, None


def _scores(
    Q_i: Float[Tensor, "*batch tile_queries d"], K_j: Float[Tensor, "*batch tile_keys d"], i: int, j: int, causal: bool
) -> Float[Tensor, "*batch tile_queries tile_keys"]:
    """Compute Q_i K_jᵀ / √d of the tile whose first query is i and first key is j; -∞ where a key is masked."""
    S_ij = _matmul(Q_i, K_j.mT) / math.sqrt(Q_i.shape[-1])
    if causal:
        queries = torch.arange(i, i + Q_i.shape[-2], device=Q_i.device)
        keys = torch.arange(j, j + K_j.shape[-2], device=Q_i.device)
        S_ij = S_ij.masked_fill(queries[:, None] < keys, -torch.inf)
    return S_ij


def _matmul(a: Float[Tensor, "*batch m k"], b: Float[Tensor, "*batch k n"]) -> Float[Tensor, "*batch m n"]:
    """Compute a b as a tensor core does: operands in their own dtype, sums in the accumulator's dtype."""
    wide = _accumulator_dtype(a)
    return a.to(wide) @ b.to(wide)


def _accumulator_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _full_precision(x: Tensor) -> torch.autocast:
    """Turn autocast off: it would turn the float32 matmuls of `_matmul` into bfloat16 ones."""
    return torch.autocast(x.device.type, enabled=False)
