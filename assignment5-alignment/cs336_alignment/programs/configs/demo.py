"""Options of `demo`."""

from dataclasses import dataclass
from pathlib import Path

from cs336_alignment.policy.config import check_positive
from cs336_alignment.runs.config import RunDir


@dataclass(frozen=True)
class DemoConfig:
    """Options of the demonstration. The defaults take a few minutes on two cores."""

    run_dir: RunDir = Path("runs/demo")
    """Folder for everything the demonstration makes. The same command resumes an interrupted one."""
    seed: int = 0
    """Seed of the problems, the initial weights, and the samples."""
    sft_examples: int = 6000
    """Number of examples to imitate."""
    sft_epochs: int = 5
    """Number of passes over them."""
    sft_lr: float = 3e-3
    """Peak learning rate of supervised fine-tuning."""
    grpo_steps: int = 80
    """Number of GRPO steps, each with one batch of rollouts and one update."""
    rollout_batch_size: int = 256
    """Responses per step, in groups of 8."""
    grpo_lr: float = 5e-4
    """Learning rate of GRPO."""
    held_out: int = 512
    """Number of problems that are neither imitated nor rewarded, for evaluation."""

    def __post_init__(self) -> None:
        check_positive(self, "sft_examples", "sft_epochs", "grpo_steps", "rollout_batch_size", "held_out")
