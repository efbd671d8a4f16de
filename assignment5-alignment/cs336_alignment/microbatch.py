"""One microbatch of training: its share of the loss of an optimizer step, and its gradients.

There are two ways to say what the share is. With microbatches of one size, each loss is a mean over the microbatch,
divided by `gradient_accumulation_steps`. With microbatches that differ in size, each is told the totals of the
optimizer batch (`total_sequences`, `total_tokens`) and `gradient_accumulation_steps` is 1.
"""

from jaxtyping import Float, Shaped
from torch import Tensor

from cs336_alignment.losses import RECIPES, Aggregation, LossType, aggregate, compute_policy_gradient_loss, kl_estimate
from cs336_alignment.masked import masked_normalize


def sft_microbatch_train_step(
    policy_log_probs: Float[Tensor, "batch seq"],
    response_mask: Shaped[Tensor, "batch seq"],
    gradient_accumulation_steps: int,
    normalize_constant: float = 1.0,
    *,
    total_sequences: int | None = None,
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """Back-propagate the negative log-likelihood of responses: their sums over `normalize_constant`, averaged.

    Returns:
        The loss that was back-propagated, without gradient, and two sums over the microbatch, which may be added up:
        `response_tokens` and `negative_log_likelihood`, in nats.
    """
    _check_steps(gradient_accumulation_steps, total_sequences)
    loss = aggregate(
        -policy_log_probs, response_mask, "masked_normalize", normalize_constant, total_sequences=total_sequences
    )
    loss = loss / gradient_accumulation_steps
    loss.backward()
    return loss.detach(), {
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
    *,
    cliprange_high: float | None = None,
    reference_log_probs: Float[Tensor, "batch seq"] | None = None,
    kl_coefficient: float = 0.0,
    aggregation: Aggregation | None = None,
    normalize_constant: float | None = None,
    total_tokens: int | None = None,
    total_sequences: int | None = None,
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """Back-propagate a policy-gradient loss, see `compute_policy_gradient_loss` and `aggregate`.

    Args:
        cliprange_high, aggregation: default: the recipe's.
        reference_log_probs: of a policy that this one should stay close to.
        kl_coefficient: how much a nat of `kl_estimate` costs a token (Shao et al. 2024, eq. 3).

    Returns:
        The loss that was back-propagated, without gradient, and tensors [batch seq]: `ratio` and `clipped` of the
        losses that have them, and `kl` if there is a reference. Off the response they are 1, False and 0.

    Raises:
        ValueError: an argument that the loss needs is missing.
    """
    _check_steps(gradient_accumulation_steps, total_tokens if total_sequences is None else total_sequences)
    # Nothing trains what is predicted at padding, so policies may drift far apart there: exp of the difference would
    # be infinite, and infinity times the mask's zero NaN
    ignored = ~response_mask.bool()
    policy_log_probs = policy_log_probs.masked_fill(ignored, 0)
    if old_log_probs is not None:
        old_log_probs = old_log_probs.masked_fill(ignored, 0)

    per_token_loss, metadata = compute_policy_gradient_loss(
        policy_log_probs, loss_type, raw_rewards, advantages, old_log_probs, cliprange, cliprange_high
    )
    if reference_log_probs is not None:
        kl = kl_estimate(policy_log_probs, reference_log_probs.masked_fill(ignored, 0))
        per_token_loss = per_token_loss + kl_coefficient * kl
        metadata["kl"] = kl.detach()
    elif kl_coefficient:
        raise ValueError(f"kl_coefficient {kl_coefficient} needs reference_log_probs, which is missing")
    loss = aggregate(
        per_token_loss,
        response_mask,
        aggregation or RECIPES[loss_type].aggregation,
        normalize_constant,
        total_tokens,
        total_sequences,
    )
    loss = loss / gradient_accumulation_steps
    loss.backward()
    return loss.detach(), metadata


def _check_steps(gradient_accumulation_steps: int, total: int | None) -> None:
    if gradient_accumulation_steps < 1:
        raise ValueError(f"gradient_accumulation_steps is {gradient_accumulation_steps}, but must be at least 1")
    if total is not None and gradient_accumulation_steps != 1:
        raise ValueError(
            f"gradient_accumulation_steps is {gradient_accumulation_steps}, but must be 1 where totals of the "
            "optimizer batch are given: they already make the loss a share of it"
        )
