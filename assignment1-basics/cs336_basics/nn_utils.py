"""Activations, softmax, the cross-entropy loss, and gradient clipping."""

from collections.abc import Iterable

import torch
from jaxtyping import Float, Int
from torch import Tensor


def silu(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """x · sigmoid(x) (Elfwing et al. 2017, Hendrycks & Gimpel 2016)."""
    return x * torch.sigmoid(x)


def squared_relu(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """max(x, 0)² (So et al. 2021)."""
    return torch.relu(x).square()


def softmax(x: Float[Tensor, "..."], dim: int = -1) -> Float[Tensor, "..."]:
    """exp(x) / Σ exp(x) along `dim`."""
    exp = torch.exp(_shift_to_max_0(x, dim))
    return exp / exp.sum(dim, keepdim=True)


def log_softmax(x: Float[Tensor, "..."], dim: int = -1) -> Float[Tensor, "..."]:
    """The logarithm of `softmax`, computed without taking the logarithm of a number that may be rounded to 0."""
    shifted = _shift_to_max_0(x, dim)
    return shifted - shifted.exp().sum(dim, keepdim=True).log()


def cross_entropy(inputs: Float[Tensor, "*batch vocab"], targets: Int[Tensor, "*batch"]) -> Float[Tensor, ""]:
    """Return the mean of -log softmax(inputs)[target], in nats, over all leading dimensions.

    It is computed as log Σ exp(inputs) - inputs[target]. Half-precision logits are summed in float32.
    """
    if inputs.dtype in (torch.float16, torch.bfloat16):
        inputs = inputs.float()
    shifted = _shift_to_max_0(inputs, -1)
    target_logits = shifted.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return (shifted.exp().sum(-1).log() - target_logits).mean()


def _shift_to_max_0(x: Float[Tensor, "..."], dim: int) -> Float[Tensor, "..."]:
    """Subtract the maximum of x, which keeps exp finite and does not change any probability.

    The maximum is detached, because its gradients cancel. Autograd would distribute them among the entries that equal
    it, and a compiler that recomputes x in another precision may find none, which leads to 0/0.
    """
    return x - x.detach().amax(dim, keepdim=True)


def clip_gradient(parameters: Iterable[Tensor], max_norm: float) -> Float[Tensor, ""]:
    """Scale all gradients, in place, so that their joint L2 norm is at most `max_norm`.

    Parameters without a gradient are skipped. The function does not wait for the GPU.

    Returns:
        The norm before clipping.
    """
    parameters = list(parameters)
    norm = gradient_norm(parameters)
    scale_gradients(parameters, norm, max_norm)
    return norm


@torch.no_grad()
def gradient_norm(parameters: Iterable[Tensor]) -> Float[Tensor, ""]:
    """Return the joint L2 norm of all gradients."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return torch.zeros(())
    norms = torch.stack(
        [norm.to(gradients[0].device) for norm in torch._foreach_norm(gradients, dtype=_norm_dtype(gradients))]
    )
    return norms.square().sum().sqrt()


@torch.no_grad()
def scale_gradients(parameters: Iterable[Tensor], norm: Float[Tensor, ""], max_norm: float) -> None:
    """Scale all gradients, whose joint norm is `norm`, in place, so that the norm becomes at most `max_norm`."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if gradients:
        torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))


def _norm_dtype(gradients: list[Tensor]) -> torch.dtype:
    return torch.float64 if gradients[0].dtype == torch.float64 else torch.float32
