"""Choosing the next tokens of a batch."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def draw_uniforms(rows: int, steps: int, seed: int | None) -> Float[Tensor, "rows steps"]:
    """Draw the random numbers in [0, 1) that decide each token of each row.

    They are drawn in advance on the CPU, so that a row's tokens depend neither on the device nor on how rows are
    distributed over batches.

    Args:
        seed: None uses PyTorch's global generator.
    """
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return torch.rand(rows, steps, dtype=torch.float64, generator=generator)


def sample_tokens(
    logits: Float[Tensor, "rows vocab"], uniforms: Float[Tensor, " rows"], temperature: float, top_p: float
) -> Int[Tensor, " rows"]:
    """Sample a token for each row, by inverting the cumulative distribution.

    Args:
        uniforms: float64 in [0, 1).
        temperature: 0 takes the most probable token.
        top_p: sample from the nucleus (Holtzman et al. 2020): the smallest set of tokens with this total probability.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits - logits.amax(-1, keepdim=True)  # so that dividing by a low temperature does not overflow
    probabilities = (logits / temperature).softmax(-1)
    order = None
    if top_p < 1:
        probabilities, order = probabilities.sort(dim=-1, descending=True)
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)  # float32 loses the tail of a large vocabulary
    if order is None:
        last = torch.full_like(cumulative[:, :1], logits.shape[-1] - 1, dtype=torch.long)
    else:
        last = (cumulative < top_p).sum(-1, keepdim=True).clamp(max=logits.shape[-1] - 1)
    target = uniforms[:, None] * cumulative.gather(-1, last)
    chosen = torch.searchsorted(cumulative, target, right=True).minimum(last)
    return (chosen if order is None else order.gather(-1, chosen)).squeeze(-1)
