"""The microbatch steps that the course's tests call. Training calls the losses and `backward` itself.

Microbatches here have one size: each loss is a mean over the microbatch, divided by `gradient_accumulation_steps`.
Training splits batches unevenly; `losses.aggregate` says how.
"""

from jaxtyping import Float, Shaped
from torch import Tensor

from cs336_alignment.tensors.losses import policy_gradient_loss, sft_loss
from cs336_alignment.tensors.masked import masked_normalize
from cs336_alignment.tensors.recipes import LossType


def sft_microbatch_train_step(
    policy_log_probs: Float[Tensor, "batch seq"],
    response_mask: Shaped[Tensor, "batch seq"],
    gradient_accumulation_steps: int,
    normalize_constant: float = 1.0,
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """Back-propagate `sft_loss`.

    Returns:
        The loss that was back-propagated, without gradient, and two sums over the microbatch: `response_tokens`, and
        `negative_log_likelihood` in nats.
    """
    loss = _backward(sft_loss(policy_log_probs, response_mask, normalize_constant), gradient_accumulation_steps)
    return loss, {
        "response_tokens": response_mask.bool().sum(),
        "negative_log_likelihood": masked_normalize(-policy_log_probs.detach(), response_mask),
    }


def grpo_microbatch_train_step(
    policy_log_probs: Float[Tensor, "batch seq"],
    response_mask: Shaped[Tensor, "batch seq"],
    gradient_accumulation_steps: int,
    loss_type: LossType,
    raw_rewards: Float[Tensor, "batch 1"] | None = None,
    advantages: Float[Tensor, "batch 1"] | None = None,
    old_log_probs: Float[Tensor, "batch seq"] | None = None,
    cliprange: float | None = None,
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """Back-propagate `policy_gradient_loss`, whose arguments and metadata these are.

    Returns:
        The loss that was back-propagated, without gradient, and the metadata.

    Raises:
        ValueError: an argument that the loss needs is missing.
    """
    loss, metadata = policy_gradient_loss(
        policy_log_probs, response_mask, loss_type, raw_rewards, advantages, old_log_probs, cliprange
    )
    return _backward(loss, gradient_accumulation_steps), metadata


def _backward(loss: Float[Tensor, ""], gradient_accumulation_steps: int) -> Float[Tensor, ""]:
    if gradient_accumulation_steps < 1:
        raise ValueError(f"gradient_accumulation_steps is {gradient_accumulation_steps}, but must be at least 1")
    loss = loss / gradient_accumulation_steps
    loss.backward()
    return loss.detach()
