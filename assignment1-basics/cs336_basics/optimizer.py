"""AdamW, the parameters that an optimizer gets, and learning-rate schedules."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, Algorithm 2; Kingma & Ba 2015, section 2).

    With gradient g at step t = 1, 2, ...

        m ← β₁ m + (1 - β₁) g            v ← β₂ v + (1 - β₂) g²
        θ ← θ - α √(1 - β₂ᵗ)/(1 - β₁ᵗ) · m / (√v + ε)
        θ ← θ - α λ θ

    Each line is a call or two over all parameters at once, which launches a handful of GPU kernels instead of hundreds.
    Parameters without a gradient are not changed.

    Args:
        params: parameters, or groups of parameters with options of their own.
        lr: learning rate α.
        betas: decay rates β₁, β₂ of the two moments, in [0, 1).
        eps: ε.
        weight_decay: λ.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        if lr < 0 or eps < 0 or weight_decay < 0:
            raise ValueError(f"lr {lr}, eps {eps} and weight_decay {weight_decay} must not be negative")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas {tuple(betas)} must lie in [0, 1)")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step_group([parameter for parameter in group["params"] if parameter.grad is not None], group)
        return loss

    def _step_group(self, parameters: list[Tensor], group: dict) -> None:
        if not parameters:
            return
        lr, (beta1, beta2), eps, weight_decay = group["lr"], group["betas"], group["eps"], group["weight_decay"]
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state |= {"t": 0, "m": torch.zeros_like(parameter), "v": torch.zeros_like(parameter)}
            state["t"] += 1
        steps = [self.state[parameter]["t"] for parameter in parameters]
        moments = [self.state[parameter]["m"] for parameter in parameters]
        second_moments = [self.state[parameter]["v"] for parameter in parameters]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]

        torch._foreach_lerp_(moments, gradients, 1 - beta1)
        torch._foreach_mul_(second_moments, beta2)
        torch._foreach_addcmul_(second_moments, gradients, gradients, 1 - beta2)
        denominators = torch._foreach_sqrt(second_moments)
        torch._foreach_add_(denominators, eps)
        step_sizes = [-lr * math.sqrt(1 - beta2**t) / (1 - beta1**t) for t in steps]
        torch._foreach_addcdiv_(parameters, moments, denominators, step_sizes)
        torch._foreach_mul_(parameters, 1 - lr * weight_decay)


def parameters_for(optimizer_class: type[torch.optim.Optimizer], model: nn.Module) -> Any:
    """Return what to pass to an optimizer: the groups its class makes with `groups(model)`, or all parameters."""
    groups = getattr(optimizer_class, "groups", None)
    return groups(model) if groups else model.parameters()


def get_cosine_lr(
    it: int, max_learning_rate: float, min_learning_rate: float, warmup_iters: int, cosine_cycle_iters: int
) -> float:
    """Return the learning rate at step `it`: a linear rise, half a cosine wave down, then flat (Touvron et al. 2023).

    - it < warmup_iters: max · it / warmup_iters
    - up to cosine_cycle_iters: min + (max - min) · (1 + cos(π · progress)) / 2
    - after it: min
    """
    if it < warmup_iters:
        return max_learning_rate * it / warmup_iters
    if it >= cosine_cycle_iters:
        return min_learning_rate
    progress = (it - warmup_iters) / (cosine_cycle_iters - warmup_iters)
    return min_learning_rate + (max_learning_rate - min_learning_rate) * (1 + math.cos(math.pi * progress)) / 2


def get_trapezoid_lr(
    it: int, max_learning_rate: float, min_learning_rate: float, warmup_iters: int, decay_iters: int, total_iters: int
) -> float:
    """Return the learning rate at step `it`: linear rise, constant, linear fall (Zhai et al. 2022; Hu et al. 2024).

    - it < warmup_iters: max · it / warmup_iters
    - up to total_iters - decay_iters: max
    - up to total_iters: on the line from max to min
    - after it: min
    """
    if it < warmup_iters:
        return max_learning_rate * it / warmup_iters
    left = min(max(total_iters - it, 0) / decay_iters, 1)
    return min_learning_rate + (max_learning_rate - min_learning_rate) * left
