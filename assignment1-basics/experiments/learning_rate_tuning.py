"""learning_rate_tuning: plain SGD with the rate lr / √(t + 1) on the mean of squares of a 10 x 10 matrix."""

import math
from dataclasses import dataclass
from pathlib import Path

from experiments.results import RESULTS, write_result


@dataclass(frozen=True)
class LearningRateTuning:
    """Ten steps at each learning rate, from the same weights; writes learning_rate_tuning.json."""

    lrs: tuple[float, ...] = (1.0, 1e1, 1e2, 1e3)
    """Learning rates."""
    steps: int = 10
    """Steps of each."""
    seed: int = 0
    """Fixes the first weights."""
    out: Path = RESULTS
    """Folder of the results."""

    def execute(self) -> None:
        """Run."""
        import torch

        rows = []
        for lr in self.lrs:
            torch.manual_seed(self.seed)
            weights = torch.nn.Parameter(5 * torch.randn(10, 10))
            losses = []
            for step in range(self.steps):
                loss = (weights**2).mean()
                losses.append(loss.item())
                (gradient,) = torch.autograd.grad(loss, weights)
                with torch.no_grad():
                    weights.sub_(gradient, alpha=lr / math.sqrt(step + 1))
            rows.append({"lr": lr, "losses": losses})
        write_result("learning_rate_tuning", "SGD on a toy", {"rows": rows}, self.out)
