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
    """Momentum, orthogonalised (Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks").

    For a matrix W [m n] in a group with `matrices=True` and its gradient G,

        M ← μ M + (1 - μ) G
        O ← U Vᵀ, where U S Vᵀ is the singular value decomposition of μ M + (1 - μ) G (Nesterov's momentum), nearly
        W ← (1 - α λ) W - α 0.2 √max(m, n) O

    The factor gives updates the size of AdamW's, so that one learning rate and one weight decay serve both (Liu et
    al. 2025, "Muon is scalable for LLM training", equation 4). All other parameters are AdamW's.

    Args:
        params: parameters for AdamW alone, or groups; `groups(model)` makes them.
        momentum: μ.
        adamw: the options of `AdamW`; lr and weight_decay are those of the matrices, too.
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
                    raise ValueError(f"a parameter of shape {tuple(parameter.shape)} is no matrix: leave it to AdamW")

    @staticmethod
    def groups(model: nn.Module) -> list[dict[str, Any]]:
        """The matrices of a model's blocks, and the rest: embeddings, head and gains."""
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
        """Updates of the size of AdamW's, [matrix m n], from orthogonal ones."""
        return orthogonal * (ADAMW_RMS * math.sqrt(max(orthogonal.shape[-2:])))


class NorMuon(Muon):
    """Muon whose neurons get updates of one size (Li et al. 2025, "NorMuon", algorithm 1).

    Rows of Muon's O differ in length. So each is divided by the root of v, a running mean (decay β₂) of its mean
    square, and the whole is scaled to a root mean square of 0.2, AdamW's.
    """

    def _more_state(self, matrix: Tensor) -> dict[str, Tensor]:
        return {"v": matrix.new_zeros(matrix.shape[0])}

    def _scaled(self, orthogonal: Tensor, matrices: list[Tensor], group: dict) -> Tensor:
        squares = [self.state[matrix]["v"] for matrix in matrices]
        wide = orthogonal.to(squares[0].dtype)
        torch._foreach_lerp_(squares, list(wide.square().mean(-1).unbind()), 1 - group["betas"][1])
        rows = wide / (torch.stack(squares).sqrt() + group["eps"])[..., None]
        return rows * (ADAMW_RMS / rows.square().mean((-2, -1), keepdim=True).sqrt())


def orthogonalize(matrices: Float[Tensor, "matrix m n"], rounds: int = 5) -> Float[Tensor, "matrix m n"]:
    """The nearest matrices whose singular values are all about 1 (0.7 to 1.2), by products in bfloat16 alone."""
    a, b, c = NEWTON_SCHULZ
    x = matrices.bfloat16()
    is_tall = x.shape[-2] > x.shape[-1]
    if is_tall:  # X Xᵀ should be the smaller of the two squares
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(rounds):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x
