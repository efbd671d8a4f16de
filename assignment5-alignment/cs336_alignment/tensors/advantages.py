"""Advantages: how much better a response is than the others to its question (Shao et al. 2024, section 4.1)."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def group_advantages(
    rewards: Float[Tensor, " n"], group_size: int, advantage_eps: float, normalize_by_std: bool
) -> tuple[Float[Tensor, " n"], Bool[Tensor, " groups"]]:
    """Subtract from each reward the mean of its group; optionally divide by the group's standard deviation.

    Args:
        rewards: one per response; those to the same question are adjacent.
        group_size: responses per question.
        advantage_eps: added to the sample standard deviation.

    Returns:
        The advantages, and for each group whether all its rewards are equal; then its advantages are exactly zero.

    Raises:
        ValueError: the rewards do not split into groups, or a group of one would be divided by its deviation.
    """
    if group_size < 1 or len(rewards) == 0 or len(rewards) % group_size:
        raise ValueError(f"{len(rewards)} rewards do not split into groups of {group_size}")
    if group_size == 1 and normalize_by_std:
        raise ValueError(
            "group_size is 1, but one reward has no standard deviation; "
            "sample at least 2 responses to a question, or set normalize_by_std to False"
        )
    groups = rewards.view(-1, group_size)
    advantages = groups - groups.mean(dim=1, keepdim=True)
    if normalize_by_std:
        advantages = advantages / (groups.std(dim=1, keepdim=True) + advantage_eps)
    # The mean of equal numbers may be off in its last digit, and the division would blow that up
    zero_std = groups.amax(dim=1) == groups.amin(dim=1)
    return advantages.masked_fill(zero_std.unsqueeze(1), 0).flatten(), zero_std


def compute_group_normalized_rewards(
    reward_fn: Callable[[str, str], dict[str, float]],
    rollout_responses: Sequence[str],
    repeated_ground_truths: Sequence[str],
    group_size: int,
    advantage_eps: float,
    normalize_by_std: bool,
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"], dict[str, float]]:
    """Grade responses, and compare the responses to the same question.

    Args:
        reward_fn: (response, ground truth) → a dict with "reward".
        rollout_responses: `group_size` responses to each question, which are adjacent.
        repeated_ground_truths: for each response, the answer to its question.

    Returns:
        The advantages, see `group_advantages`; the raw rewards; and `mean`, `std`, `max`, `min` of the raw rewards and
        `frac_reward_zero_std`, the fraction of groups in which all rewards are equal. `std` is the sample standard
        deviation over all rewards; for a single reward it is 0.

    Raises:
        ValueError: there is not one ground truth for each response, or they do not split into groups.
    """
    if len(rollout_responses) != len(repeated_ground_truths):
        raise ValueError(
            f"there are {len(rollout_responses)} responses, but {len(repeated_ground_truths)} ground truths; "
            "repeat each truth for every response of its group"
        )
    rewards = torch.tensor(
        [reward_fn(response, truth)["reward"] for response, truth in zip(rollout_responses, repeated_ground_truths)],
        dtype=torch.float32,
    )
    advantages, zero_std = group_advantages(rewards, group_size, advantage_eps, normalize_by_std)
    metadata = {
        "mean": rewards.mean().item(),
        "std": rewards.std().item() if len(rewards) > 1 else 0.0,
        "max": rewards.max().item(),
        "min": rewards.min().item(),
        "frac_reward_zero_std": zero_std.double().mean().item(),
    }
    return advantages, rewards, metadata
