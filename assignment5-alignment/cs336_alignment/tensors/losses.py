"""Policy-gradient losses token by token, how the tokens of a batch become one number, and the loss of SFT.

Each response of a batch has a reward or an advantage, [batch 1], and the log-probabilities of its tokens under the
policy, [batch seq]. Where the tokens were sampled from an older policy, `old_log_probs` are those under that policy.
`recipes` says what the names of the losses stand for.
"""

from typing import TypeVar

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from cs336_alignment.tensors.masked import masked_normalize
from cs336_alignment.tensors.recipes import RECIPES, Aggregation, LossType

T = TypeVar("T")


def compute_naive_policy_gradient_loss(
    raw_rewards_or_advantages: Float[Tensor, "batch 1"], policy_log_probs: Float[Tensor, "batch seq"]
) -> Float[Tensor, "batch seq"]:
    """−A · log p of each token, whose gradient is REINFORCE's (Williams 1992)."""
    return -raw_rewards_or_advantages * policy_log_probs


def compute_grpo_clip_loss(
    advantages: Float[Tensor, "batch 1"],
    policy_log_probs: Float[Tensor, "batch seq"],
    old_log_probs: Float[Tensor, "batch seq"],
    cliprange: float,
    cliprange_high: float | None = None,
) -> tuple[Float[Tensor, "batch seq"], dict[str, Tensor]]:
    """−min(r · A, clip(r, 1 − cliprange, 1 + cliprange_high) · A), where r = p / p_old (Schulman et al. 2017, eq. 7).

    Args:
        cliprange_high: default: `cliprange`.

    Returns:
        The loss of each token, and tensors [batch seq] without gradient:
        `clipped`, True where the clipped term is the smaller one, so that the token has no gradient;
        `ratio`, r.
    """
    ratio = (policy_log_probs - old_log_probs).exp()
    unclipped = ratio * advantages
    highest = 1 + (cliprange if cliprange_high is None else cliprange_high)
    clipped = ratio.clamp(1 - cliprange, highest) * advantages
    metadata = {"clipped": clipped.detach() < unclipped.detach(), "ratio": ratio.detach()}
    return -torch.minimum(unclipped, clipped), metadata


def compute_grpo_no_clip_loss(
    advantages: Float[Tensor, "batch 1"],
    policy_log_probs: Float[Tensor, "batch seq"],
    old_log_probs: Float[Tensor, "batch seq"],
) -> tuple[Float[Tensor, "batch seq"], dict[str, Tensor]]:
    """−r · A, where r = p / p_old; also returns `ratio`, r, without gradient."""
    ratio = (policy_log_probs - old_log_probs).exp()
    return -ratio * advantages, {"ratio": ratio.detach()}


def compute_policy_gradient_loss(
    policy_log_probs: Float[Tensor, "batch seq"],
    loss_type: LossType,
    raw_rewards: Float[Tensor, "batch 1"] | None = None,
    advantages: Float[Tensor, "batch 1"] | None = None,
    old_log_probs: Float[Tensor, "batch seq"] | None = None,
    cliprange: float | None = None,
    cliprange_high: float | None = None,
) -> tuple[Float[Tensor, "batch seq"], dict[str, Tensor]]:
    """Compute the loss of each token, by the name of the loss, and metadata to log.

    Args:
        cliprange_high: default: the recipe's.

    Raises:
        ValueError: there is no such loss, or an argument that it needs is missing.
    """
    if loss_type not in RECIPES:
        raise ValueError(f"there is no loss_type {loss_type!r}; choose one of {', '.join(RECIPES)}")
    recipe = RECIPES[loss_type]
    if recipe.weight == "raw_rewards":
        weights = _needed(raw_rewards, "raw_rewards", loss_type)
    else:
        weights = _needed(advantages, "advantages", loss_type)
    if recipe.token_loss == "reinforce":
        return compute_naive_policy_gradient_loss(weights, policy_log_probs), {}
    old_log_probs = _needed(old_log_probs, "old_log_probs", loss_type)
    if recipe.token_loss == "no_clip":
        return compute_grpo_no_clip_loss(weights, policy_log_probs, old_log_probs)
    cliprange = _needed(cliprange, "cliprange", loss_type)
    highest = recipe.cliprange_high if cliprange_high is None else cliprange_high
    return compute_grpo_clip_loss(weights, policy_log_probs, old_log_probs, cliprange, highest)


def _needed(value: T | None, name: str, loss_type: str) -> T:
    if value is None:
        raise ValueError(f"loss_type {loss_type!r} needs {name}, which is missing")
    return value


def policy_gradient_loss(
    policy_log_probs: Float[Tensor, "batch seq"],
    response_mask: Shaped[Tensor, "batch seq"],
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
    """Compute the policy-gradient loss of a batch or of a microbatch, ready to be back-propagated.

    Args:
        cliprange_high, aggregation: default: the recipe's.
        reference_log_probs: log-probabilities under a frozen policy that this one should stay close to.
        kl_coefficient: weight of `kl_estimate`, in nats, in the loss of each token (Shao et al. 2024, eq. 3).
        normalize_constant, total_tokens, total_sequences: see `aggregate`.

    Returns:
        The loss, and tensors [batch seq] without gradient: `ratio` and `clipped` for losses that have them, and `kl`
        if there is a reference. Outside the response they are 1, False and 0.

    Raises:
        ValueError: an argument that the loss needs is missing.
    """
    # Nothing trains the predictions at padding, so policies may drift far apart there: exp of the difference would be
    # infinite, and infinity times the mask's zero is NaN.
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
    aggregation = aggregation or RECIPES[loss_type].aggregation
    loss = aggregate(per_token_loss, response_mask, aggregation, normalize_constant, total_tokens, total_sequences)
    return loss, metadata


def sft_loss(
    policy_log_probs: Float[Tensor, "batch seq"],
    response_mask: Shaped[Tensor, "batch seq"],
    normalize_constant: float = 1.0,
    total_sequences: int | None = None,
) -> Float[Tensor, ""]:
    """Sum −log p over the tokens of each response, divide by `normalize_constant`, and average over responses."""
    return aggregate(
        -policy_log_probs, response_mask, "masked_normalize", normalize_constant, total_sequences=total_sequences
    )


def kl_estimate(
    policy_log_probs: Float[Tensor, "batch seq"], reference_log_probs: Float[Tensor, "batch seq"]
) -> Float[Tensor, "batch seq"]:
    """Estimate KL(policy ‖ reference) from one sampled token: x − 1 − log x, where x = p_reference / p.

    It is never negative, unbiased, and has a smaller variance than −log x: "k3" of Schulman 2020, "Approximating KL
    Divergence".
    """
    log_ratio = reference_log_probs - policy_log_probs
    return log_ratio.expm1() - log_ratio


def aggregate(
    per_token_loss: Float[Tensor, "batch seq"],
    mask: Shaped[Tensor, "batch seq"],
    aggregation: Aggregation,
    normalize_constant: float | None = None,
    total_tokens: int | None = None,
    total_sequences: int | None = None,
) -> Float[Tensor, ""]:
    """Reduce the losses of tokens to the loss of a batch, or to a microbatch's share of it.

    For a microbatch, pass the totals of its optimizer batch. The shares then add up to the loss of the whole batch,
    however it was split.

    Args:
        mask: True (or 1) on response tokens. An empty response contributes zero, but counts as a sequence.
        aggregation: TRL's names are in brackets:
            "masked_mean": the mean over each response, then over responses (grpo);
            "masked_normalize": the sum over each response over a constant, then the mean over responses (dr_grpo);
            "token_mean": the mean over all tokens, so that long responses weigh more (dapo; bnpo without totals).
        normalize_constant: for masked_normalize, for example the maximum number of tokens of a response.
        total_tokens: number of response tokens in the optimizer batch. Default: those here.
        total_sequences: number of responses in the optimizer batch. Default: those here.

    Raises:
        ValueError: there is no such aggregation, or the constant is missing.
    """
    sums = masked_normalize(per_token_loss, mask, dim=-1)
    counts = mask.bool().sum(-1)
    sequences = len(mask) if total_sequences is None else total_sequences
    if aggregation == "masked_mean":
        return (sums / counts.clamp(min=1)).sum() / sequences
    if aggregation == "masked_normalize":
        if normalize_constant is None:
            raise ValueError("aggregation 'masked_normalize' needs normalize_constant, which is missing")
        return sums.sum() / normalize_constant / sequences
    if aggregation == "token_mean":
        return sums.sum() / (counts.sum().clamp(min=1) if total_tokens is None else max(1, total_tokens))
    raise ValueError(
        f"there is no aggregation {aggregation!r}; choose one of masked_mean, masked_normalize, token_mean"
    )
