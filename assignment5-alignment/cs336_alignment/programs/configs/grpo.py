"""Options of `grpo`."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from cs336_alignment.policy.config import check_positive
from cs336_alignment.rollouts.config import EvaluationConfig, RolloutConfig
from cs336_alignment.runs.config import RunDir, TrainingConfig
from cs336_alignment.tensors.recipes import RECIPES, Aggregation, LossType, Recipe


@dataclass(frozen=True)
class GrpoConfig(TrainingConfig):
    """Options of GRPO."""

    run_dir: RunDir = Path("runs/grpo")
    """Folder of the run. If it holds an unfinished run, that run is resumed."""
    train_data: Path = Path("data/math/train.jsonl")
    """File of questions with answers."""
    n_grpo_steps: int = 200
    """Number of steps. Each samples a batch of rollouts and makes the updates that use it."""
    rollout_batch_size: int = 256
    """Responses per step."""
    group_size: int = 8
    """Responses to the same question, which are compared with each other."""
    min_tokens: int = 4
    """Minimum number of tokens in a response."""
    epochs_per_rollout_batch: int = 1
    """Number of passes over the responses of a step. With more than one, later updates are off-policy."""
    train_batch_size: int = 256
    """Responses per update. If fewer than rollout_batch_size, later updates of a step are off-policy."""
    loss_type: LossType = "reinforce_with_baseline"
    """Loss, and other choices that go by its name; see tensors/recipes.py. The default is REINFORCE with advantages.
    The clipped loss of the GRPO paper is grpo_clip. In the first update of a step both have the same gradient."""
    use_std_normalization: bool = True
    """Divide advantages by the standard deviation of the rewards of their group; dr_grpo never does."""
    advantage_eps: float = 1e-6
    """Added to that standard deviation."""
    cliprange: float = 0.2
    """In losses that clip: how far the ratio of new to old probabilities may move from 1."""
    cliprange_high: float | None = None
    """How far that ratio may rise above 1, if not as far as it may fall. Default: that of the loss type."""
    length_normalization: Aggregation | None = None
    """How the losses of a batch's tokens become one number; see losses.aggregate. Default: that of the loss type."""
    normalize_constant: float | None = None
    """With masked_normalize: divide the sum over a response's tokens by this. Default: max_tokens."""
    kl_coefficient: float = 0.0
    """Weight, per token, of the KL divergence from the model that training started with, in nats."""
    max_rollout_rounds: int = 4
    """With dapo: how often a step may draw questions until enough groups contain different rewards."""
    checkpoint_every: int = 20
    """Save a checkpoint after this many steps. The last step is always saved."""
    rollouts: RolloutConfig = field(default_factory=RolloutConfig)
    """How responses are sampled and graded."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """When and on what the policy is evaluated."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "n_grpo_steps", "rollout_batch_size", "group_size", "epochs_per_rollout_batch")
        check_positive(self, "train_batch_size", "max_rollout_rounds")
        self.optimizer.check_batch_size("train_batch_size", self.train_batch_size)
        self._check_group_sizes()
        if self.rollouts.reward is None:
            raise ValueError("GRPO needs a reward function, but reward is None")
        if self.rollouts.temperature == 0:
            raise ValueError("temperature is 0, but then all responses of a group are the same; choose one above 0")
        for name in ("advantage_eps", "cliprange", "cliprange_high", "kl_coefficient"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, but must not be negative")
        if self.normalize_constant is not None and not self.normalize_constant > 0:
            raise ValueError(f"normalize_constant is {self.normalize_constant}, but must be positive")
        self.rollouts.sampling(min_tokens=self.min_tokens)

    def _check_group_sizes(self) -> None:
        if self.rollout_batch_size % self.group_size:
            raise ValueError(
                f"rollout_batch_size {self.rollout_batch_size} must be a multiple of group_size {self.group_size}, "
                "because it consists of whole groups"
            )
        if self.train_batch_size < self.group_size:
            raise ValueError(
                f"train_batch_size {self.train_batch_size} must be at least group_size {self.group_size}, "
                "because an update needs a group"
            )
        if self.rollout_batch_size % self.train_batch_size:
            raise ValueError(
                f"rollout_batch_size {self.rollout_batch_size} must be a multiple of train_batch_size "
                f"{self.train_batch_size}, because an epoch consists of whole updates"
            )
        if self.group_size == 1 and self.recipe.weight == "advantages":
            raise ValueError(
                f"group_size is 1, but loss_type {self.loss_type!r} compares the responses of a group; "
                "set group_size to at least 2, or choose loss_type no_baseline"
            )

    @property
    def recipe(self) -> Recipe:
        """The recipe of the loss type, with the choices that this configuration overrides."""
        named = RECIPES[self.loss_type]
        return replace(
            named,
            normalize_by_std=named.normalize_by_std and self.use_std_normalization,
            aggregation=self.length_normalization or named.aggregation,
            cliprange_high=named.cliprange_high if self.cliprange_high is None else self.cliprange_high,
        )

    @property
    def updates_per_step(self) -> int:
        return self.epochs_per_rollout_batch * (self.rollout_batch_size // self.train_batch_size)

    @property
    def off_policy(self) -> bool:
        """Whether some updates use responses that an older policy sampled."""
        return self.updates_per_step > 1
