"""Log-probabilities of given tokens, and entropies, in little more memory than the logits themselves.

Logits are the largest tensor of training: with a vocabulary of 150 000, each token takes 300 kB in bfloat16. A naive
log-softmax in float32 keeps several times that. Here float32 exists for a few rows at a time: the forward pass keeps
one number per token, the log-sum-exp, and the backward pass computes the softmax again from it.
"""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

#: Number of logits that are in float32 at a time: 64 MiB.
CHUNK_ELEMENTS = 2**24


def compute_entropy(logits: Float[Tensor, "*batch vocab"]) -> Float[Tensor, "*batch"]:
    """Compute the entropy of softmax(logits), −Σ p log p, in nats; for half-precision logits in float32.

    A logit of −∞ means probability 0 and contributes nothing.
    """
    logits = _at_least_float32(logits)
    log_probs = logits - logits.logsumexp(-1, keepdim=True)
    # 0 · log 0 is 0, but 0 · −∞ would be NaN
    return -(log_probs.exp() * log_probs.clamp(min=torch.finfo(logits.dtype).min)).sum(-1)


def get_response_log_probs(
    model: nn.Module,
    input_ids: Int[Tensor, "batch seq"],
    labels: Int[Tensor, "batch seq"],
    return_token_entropy: bool = False,
    *,
    temperature: float = 1.0,
    attention_mask: Bool[Tensor, "batch seq"] | None = None,
) -> dict[str, Float[Tensor, "batch seq"]]:
    """Compute the log-probability that a causal language model gives each label, given the inputs up to its position.

    Args:
        model: returns an object with `logits` [batch seq vocab], as those of transformers do.
        labels: the token after each input. A response mask later selects those that count.
        return_token_entropy: also compute the entropy of each prediction.
        temperature: the logits are divided by it, as in sampling.
        attention_mask: False on padding. Only needed if there is padding on the left; positions are then counted
            from the first token after it.

    Returns:
        `log_probs`, log p(label | inputs so far), in float32 even for half-precision logits;
        `token_entropy`, if asked for, in nats and without gradient.
    """
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}, but log-probabilities need one above 0")
    padding: dict[str, Tensor] = {}
    if attention_mask is not None:
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        padding = {"attention_mask": attention_mask.long(), "position_ids": positions}
    logits = model(input_ids, **padding).logits
    result = {"log_probs": _selected_log_probs(logits, labels, temperature)}
    if return_token_entropy:
        result["token_entropy"] = _token_entropy(logits, temperature)
    return result


def _selected_log_probs(
    logits: Float[Tensor, "*batch vocab"], labels: Int[Tensor, "*batch"], temperature: float
) -> Float[Tensor, "*batch"]:
    rows = _SelectedLogProbs.apply(logits.flatten(0, -2), labels.flatten(), temperature)
    return rows.view(labels.shape)


@torch.no_grad()
def _token_entropy(logits: Float[Tensor, "*batch vocab"], temperature: float) -> Float[Tensor, "*batch"]:
    chunks = [compute_entropy(scaled) for _, scaled in _scaled_chunks(logits.flatten(0, -2), temperature)]
    return torch.cat(chunks).view(logits.shape[:-1])


class _SelectedLogProbs(torch.autograd.Function):
    """log softmax(logits / T) at one label per row: z(label) − log Σ exp z, where z = logits / T."""

    @staticmethod
    def forward(
        ctx: Any, logits: Float[Tensor, "rows vocab"], labels: Int[Tensor, " rows"], temperature: float
    ) -> Float[Tensor, " rows"]:
        selected, log_sums = [], []
        for rows, scaled in _scaled_chunks(logits, temperature):
            selected.append(scaled.gather(-1, labels[rows].unsqueeze(-1)).squeeze(-1))
            log_sums.append(scaled.logsumexp(-1))
        log_sum = torch.cat(log_sums)
        ctx.save_for_backward(logits, labels, log_sum)
        ctx.temperature = temperature
        return torch.cat(selected) - log_sum

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Float[Tensor, " rows"]) -> tuple[Float[Tensor, "rows vocab"], None, None]:
        """d log p(label) / d logits = (1[token is label] − softmax) / T."""
        logits, labels, log_sum = ctx.saved_tensors
        logits_gradient = torch.empty_like(logits)
        for rows, scaled in _scaled_chunks(logits, ctx.temperature):
            weight = (gradient[rows] / ctx.temperature).unsqueeze(-1)
            softmax = scaled.sub_(log_sum[rows].unsqueeze(-1)).exp_()
            logits_gradient[rows] = softmax.mul_(-weight).scatter_add_(-1, labels[rows].unsqueeze(-1), weight)
        return logits_gradient, None, None


def _scaled_chunks(logits: Float[Tensor, "rows vocab"], temperature: float) -> Iterator[tuple[slice, Tensor]]:
    """Yield a few rows at a time, in float32 (or float64), divided by the temperature. They may be overwritten."""
    size = max(1, CHUNK_ELEMENTS // logits.shape[-1])
    for start in range(0, max(1, len(logits)), size):
        rows = slice(start, start + size)
        yield rows, _at_least_float32(logits[rows]) / temperature


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
