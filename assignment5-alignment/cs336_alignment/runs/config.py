"""Options that every training program has. This module imports no PyTorch, so that `--help` is quick."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from cs336_alignment.policy.config import OptimizerConfig, Precision, check_positive

#: A run folder on the command line: `--run-dir`, or `--run` for short.
RunDir = Annotated[Path, tyro.conf.arg(aliases=["--run"])]


@dataclass(frozen=True)
class TrainingConfig:
    """Options that every training program has."""

    run_dir: RunDir = Path("runs/train")
    """Folder of the run. If it holds an unfinished run, that run is resumed."""
    model: str = "Qwen/Qwen2.5-Math-1.5B"
    """The model to start from: a Hugging Face folder, such as a checkpoint of another run, or a name on the hub."""
    seed: int = 0
    """Seed of the data order and of the samples."""
    device: str = "auto"
    """Device to train the policy on: cpu, cuda, cuda:1, …, or auto for a GPU if there is one."""
    precision: Precision = "bfloat16"
    """Number format to compute in. bfloat16 is used under autocast; weights and optimizer stay in float32."""
    gradient_checkpointing: bool = False
    """Save memory by computing activations again in the backward pass, at about a third more time."""
    checkpoint_every: int = 50
    """Save a checkpoint after this many steps. The last step is always saved."""
    keep_checkpoints: int = 2
    """Keep this many of the latest checkpoints and delete the older ones."""
    wandb_project: str | None = None
    """Also send the metrics to this W&B project."""
    allow_overlap: bool = False
    """Train even if some training problems are also in the evaluation data."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """How the policy is updated."""

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}, but must not be negative")
        check_positive(self, "checkpoint_every", "keep_checkpoints")


#: Fields that may differ when a run is resumed, because the weights depend on them by rounding at most.
MAY_CHANGE = {
    *("run_dir", "device", "checkpoint_every", "keep_checkpoints", "wandb_project", "allow_overlap"),
    *("gradient_checkpointing", "optimizer.gradient_accumulation_steps", "optimizer.microbatch_tokens"),
    *("rollouts.engine.engine_device", "rollouts.engine.gpu_memory_utilization", "rollouts.grading_workers"),
    "evaluation.log_examples",
}
