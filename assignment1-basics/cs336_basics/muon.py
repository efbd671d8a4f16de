"""Muon and NorMuon: descent in the spectral norm for the matrices of a model, AdamW for everything else."""

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cs336_basics.model import TransformerBlock
from cs336_basics.optimizer import AdamW

#: x ← a x + b x³ + c x⁵ moves every singular value in (0, 1] to about 1 within five rounds (Jordan et al. 2024).
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
#: The root mean square of AdamW's updates, as measured by Liu et al. (2025, section 2.2).
ADAMW_RMS = 0.2


class Muon(AdamW):
    """Orthogonalized momentum (Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks").

    For a matrix W [m n] in a group with `matrices=True` and its gradient G,

        M ← μ M + (1 - μ) G
        O ≈ U Vᵀ, where U S Vᵀ is the singular value decomposition of μ M + (1 - μ) G (Nesterov's momentum)
        W ← (1 - α λ) W - α 0.2 √max(m, n) O

    The factor makes the updates as large as AdamW's, so that one learning rate and one weight decay serve both (Liu et
    al. 2025, "Muon is scalable for LLM training", equation 4). All other parameters are updated by AdamW.

    Args:
        params: groups made by `groups(model)`, or parameters, which are then all updated by AdamW.
        momentum: μ.
        adamw: the options of `AdamW`; lr and weight_decay apply to the matrices too.
    """

    def __init__(self, params: Iterable[Tensor] | Iterable[dict], *, momentum: float = 0.95, **adamw: Any) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum {momentum} must lie in [0, 1)")
        super().__init__(params, **adamw)
        self.defaults |= {"momentum": momentum, "matrices": False}
        for group in self.param_groups:
            for name in ("momentum", "matrices"):
                group.setdefault(name, self.defaults[name])
            for parameter in group["params"]:
                if group["matrices"] and parameter.ndim != 2:
                    raise ValueError(
                        f"a parameter of shape {tuple(parameter.shape)} is not a matrix; leave it to AdamW"
                    )

    @staticmethod
    def groups(model: nn.Module) -> list[dict[str, Any]]:
        """Group a model's parameters: the matrices of its blocks, and the rest (embeddings, head and gains)."""
        blocks = [module for module in model.modules() if isinstance(module, TransformerBlock)]
        inner = {parameter for block in blocks for parameter in block.parameters() if parameter.ndim == 2}
        rest = [parameter for parameter in model.parameters() if parameter not in inner]
        matrices = [parameter for parameter in model.parameters() if parameter in inner]
        return [{"params": matrices, "matrices": True}, {"params": rest}]

    def _step_group(self, parameters: list[Tensor], group: dict) -> None:
        if not group["matrices"]:
            super()._step_group(parameters, group)
            return
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter] |= {"m": torch.zeros_like(parameter), **self._more_state(parameter)}
        by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
        for parameter in parameters:
            by_shape[parameter.shape].append(parameter)
        for same_shape in by_shape.values():
            gradients = [parameter.grad for parameter in same_shape if parameter.grad is not None]
            moments = [self.state[parameter]["m"] for parameter in same_shape]
            torch._foreach_lerp_(moments, gradients, 1 - group["momentum"])
            ahead = torch.stack([gradient.lerp(m, group["momentum"]) for gradient, m in zip(gradients, moments)])
            updates = self._scaled(orthogonalize(ahead), same_shape, group).to(ahead.dtype)
            torch._foreach_mul_(same_shape, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(same_shape, list(updates.unbind()), alpha=-group["lr"])

    def _more_state(self, matrix: Tensor) -> dict[str, Tensor]:
        return {}

    def _scaled(self, orthogonal: Tensor, matrices: list[Tensor], group: dict) -> Tensor:
        """Scale orthogonal updates, [matrix m n], to the size of AdamW's."""
        return orthogonal * (ADAMW_RMS * math.sqrt(max(orthogonal.shape[-2:])))


class NorMuon(Muon):
    """Muon with updates of one size for every neuron (Li et al. 2025, "NorMuon", algorithm 1).

    The rows of Muon's O differ in length. NorMuon divides each row by the root of v, a running mean (decay rate β₂) of
    its mean square, and scales the whole to a root mean square of 0.2, that of AdamW's updates.
    """

    def _more_state(self, matrix: Tensor) -> dict[str, Tensor]:
        return {"v": matrix.new_zeros(matrix.shape[0])}

    def _scaled(self, orthogonal: Tensor, matrices: list[Tensor], group: dict) -> Tensor:
        second_moments = [self.state[matrix]["v"] for matrix in matrices]
        wide = orthogonal.to(second_moments[0].dtype)
        torch._foreach_lerp_(second_moments, list(wide.square().mean(-1).unbind()), 1 - group["betas"][1])
        rows = wide / (torch.stack(second_moments).sqrt() + group["eps"])[..., None]
        return rows * (ADAMW_RMS / rows.square().mean((-2, -1), keepdim=True).sqrt())


def orthogonalize(matrices: Float[Tensor, "matrix m n"], rounds: int = 5) -> Float[Tensor, "matrix m n"]:
    """Return the nearest matrices with all singular values close to 1 (0.7 to 1.2), using only bfloat16 matmuls."""
    a, b, c = NEWTON_SCHULZ
    x = matrices.bfloat16()
    is_tall = x.shape[-2] > x.shape[-1]
    if is_tall:  # so that X Xᵀ is the smaller of the two Gram matrices
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(rounds):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x
