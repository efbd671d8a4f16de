"""learning_rate_tuning: plain SGD with learning rate lr / √(t + 1) on the mean square of a 10 x 10 matrix."""

import math
from dataclasses import dataclass
from pathlib import Path

from experiments.results import RESULTS, write_result


@dataclass(frozen=True)
class LearningRateTuning:
    """Take a few SGD steps at each learning rate, always from the same weights."""

    lrs: tuple[float, ...] = (1.0, 1e1, 1e2, 1e3)
    """Learning rates to try."""
    steps: int = 10
    """Steps at each learning rate."""
    seed: int = 0
    """Determines the initial weights."""
    out: Path = RESULTS
    """Folder of the results."""

    def execute(self) -> None:
        """Run them, and write learning_rate_tuning.json."""
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
