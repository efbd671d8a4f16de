"""The policy-gradient losses by name. This module imports no PyTorch, so that `--help` is quick."""

from dataclasses import dataclass
from typing import Literal

LossType = Literal["no_baseline", "reinforce_with_baseline", "grpo_clip", "grpo_no_clip", "dr_grpo", "dapo"]
Aggregation = Literal["masked_mean", "masked_normalize", "token_mean"]


@dataclass(frozen=True)
class Recipe:
    """The choices that the name of a loss stands for. Options of `grpo` can override the last four fields."""

    token_loss: Literal["reinforce", "clip", "no_clip"]
    """The loss of a token."""
    weight: Literal["raw_rewards", "advantages"]
    """Its weight: the reward of the response, or by how much that exceeds the mean of its group."""
    normalize_by_std: bool = True
    """Whether advantages are divided by the standard deviation of their group."""
    aggregation: Aggregation = "masked_mean"
    """How the losses of a batch's tokens become one number; see `losses.aggregate`."""
    cliprange_high: float | None = None
    """How far the probability ratio may rise above 1. None: as far as it may fall below 1."""
    skip_equal_groups: bool = False
    """Whether groups in which all rewards are equal, which teach nothing, are replaced by groups of other questions."""


RECIPES: dict[LossType, Recipe] = {
    "no_baseline": Recipe("reinforce", "raw_rewards"),
    "reinforce_with_baseline": Recipe("reinforce", "advantages"),
    # Shao et al. 2024, "DeepSeekMath", section 4.1, and the same without its clipping
    "grpo_clip": Recipe("clip", "advantages"),
    "grpo_no_clip": Recipe("no_clip", "advantages"),
    # Liu et al. 2025, "Understanding R1-Zero-Like Training", section 3.2: no bias towards long wrong answers or
    # towards questions that are nearly always, or nearly never, answered
    "dr_grpo": Recipe("clip", "advantages", normalize_by_std=False, aggregation="masked_normalize"),
    # Yu et al. 2025, "DAPO", section 3: clip-higher, token-level loss and dynamic sampling
    "dapo": Recipe("clip", "advantages", aggregation="token_mean", cliprange_high=0.28, skip_equal_groups=True),
}
