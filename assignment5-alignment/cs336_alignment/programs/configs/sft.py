"""Options of `sft`, and of the supervised updates that other programs make too."""

from dataclasses import dataclass, field
from pathlib import Path

from cs336_alignment.policy.config import OptimizerConfig, check_positive
from cs336_alignment.rollouts.config import EvaluationConfig, RolloutConfig
from cs336_alignment.runs.config import RunDir, TrainingConfig


@dataclass(frozen=True)
class SftUpdateConfig:
    """How the policy is fine-tuned on responses."""

    epochs: int = 1
    """Number of passes over the responses."""
    batch_size: int = 64
    """Responses per update."""
    normalize_constant: float = 1.0
    """The loss of a response is the sum over its tokens divided by this; that of a batch is the mean over responses."""

    def __post_init__(self) -> None:
        check_positive(self, "epochs", "batch_size")
        if self.normalize_constant <= 0:
            raise ValueError(f"normalize_constant is {self.normalize_constant}, but must be positive")


@dataclass(frozen=True)
class SftConfig(TrainingConfig):
    """Options of supervised fine-tuning."""

    run_dir: RunDir = Path("runs/sft")
    """Folder of the run. If it holds an unfinished run, that run is resumed."""
    train_data: Path = Path("data/math/sft.jsonl")
    """JSON lines with `prompt`, already in its template, and `response`."""
    train_examples: int | None = None
    """Train on a random subset of this many examples. A smaller subset is contained in a larger one.
    Default: all of them."""
    only_correct: bool = False
    """Leave out responses that do not receive the full reward.
    The data then needs the true answers, in the field `ground_truth` or `answer`."""
    imitation: SftUpdateConfig = SftUpdateConfig()
    """How the policy is fine-tuned on responses."""
    optimizer: OptimizerConfig = OptimizerConfig(gradient_accumulation_steps=32)
    """How the policy is updated."""
    rollouts: RolloutConfig = field(default_factory=RolloutConfig)
    """How responses are sampled and graded in evaluations."""
    evaluation: EvaluationConfig = EvaluationConfig(eval_every=50)
    """When and on what the policy is evaluated. A step is an update."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "train_examples")
        self.optimizer.check_batch_size("batch_size", self.imitation.batch_size)
        if self.only_correct and self.rollouts.reward is None:
            raise ValueError("only_correct needs a reward function, but reward is None")
