"""Options of `dpo`."""

from dataclasses import dataclass
from pathlib import Path

from cs336_alignment.datasets.preferences import HH_SUBSETS
from cs336_alignment.policy.config import OptimizerConfig, check_positive
from cs336_alignment.runs.config import RunDir, TrainingConfig


@dataclass(frozen=True)
class DpoConfig(TrainingConfig):
    """Options of DPO."""

    run_dir: RunDir = Path("runs/dpo")
    """Folder of the run. If it holds an unfinished run, that run is resumed."""
    train_data: tuple[Path, ...] = tuple(Path(f"data/hh/{subset}/train.jsonl.gz") for subset in HH_SUBSETS)
    """Files of preference pairs, as JSON lines. Dialogues of more than one turn are left out."""
    held_out_pairs: int = 200
    """Number of pairs to evaluate on instead of training on them; a random choice, always the same.
    0: no evaluation."""
    allow_overlap: bool = False
    """Also train on pairs that share their prompt with a held-out pair. By default they are left out."""
    eval_every: int = 50
    """Evaluate after this many updates. There is also an evaluation before the first update and after the last."""
    epochs: int = 1
    """Number of passes over the pairs."""
    batch_size: int = 64
    """Pairs per update."""
    beta: float = 0.1
    """How strongly the policy is held to the reference: a reward is beta times the log-ratio of their probabilities."""
    max_tokens: int | None = None
    """Leave out pairs in which a prompt with a response is longer than this. Default: the model's context."""
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-6, algorithm="rmsprop", microbatch_tokens=8192)
    """How the policy is updated. The length of a pair includes both responses, each with its prompt."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "eval_every", "epochs", "batch_size", "max_tokens")
        if not self.train_data:
            raise ValueError("train_data is empty; name at least one file of preference pairs")
        if self.held_out_pairs < 0:
            raise ValueError(f"held_out_pairs is {self.held_out_pairs}, but must not be negative")
        if self.beta <= 0:
            raise ValueError(f"beta is {self.beta}, but must be positive")
        self.optimizer.check_batch_size("batch_size", self.batch_size)
