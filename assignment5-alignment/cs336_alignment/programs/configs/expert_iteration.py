"""Options of `expert-iteration`."""

from dataclasses import dataclass, field
from pathlib import Path

from cs336_alignment.policy.config import OptimizerConfig, check_positive
from cs336_alignment.programs.configs.sft import SftUpdateConfig
from cs336_alignment.rollouts.config import EvaluationConfig, RolloutConfig
from cs336_alignment.runs.config import RunDir, TrainingConfig


@dataclass(frozen=True)
class ExpertIterationConfig(TrainingConfig):
    """Options of expert iteration."""

    run_dir: RunDir = Path("runs/expert_iteration")
    """Folder of the run. If it holds an unfinished run, that run is resumed."""
    train_data: Path = Path("data/math/train.jsonl")
    """File of questions with answers."""
    n_ei_steps: int = 5
    """Number of steps. Each samples responses and then fine-tunes on the correct ones."""
    question_batch_size: int = 512
    """Questions per step."""
    rollouts_per_question: int = 8
    """Responses to each question."""
    min_tokens: int = 4
    """Minimum number of tokens in a response."""
    checkpoint_every: int = 1
    """Save a checkpoint after this many steps. The last step is always saved."""
    imitation: SftUpdateConfig = SftUpdateConfig()
    """How the policy is fine-tuned on the correct responses of a step."""
    optimizer: OptimizerConfig = OptimizerConfig(gradient_accumulation_steps=32)
    """How the policy is updated. A learning rate schedule starts again in each step."""
    rollouts: RolloutConfig = field(default_factory=RolloutConfig)
    """How responses are sampled and graded."""
    evaluation: EvaluationConfig = EvaluationConfig(eval_every=1)
    """When and on what the policy is evaluated."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "n_ei_steps", "question_batch_size", "rollouts_per_question")
        self.optimizer.check_batch_size("batch_size", self.imitation.batch_size)
        if self.rollouts.reward is None:
            raise ValueError("expert iteration needs a reward function, but reward is None")
        self.rollouts.sampling(min_tokens=self.min_tokens)
