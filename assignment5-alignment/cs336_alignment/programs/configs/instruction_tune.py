"""Options of `instruction-tune`."""

from dataclasses import dataclass
from pathlib import Path

from cs336_alignment.policy.config import OptimizerConfig, check_positive
from cs336_alignment.programs.configs.sft import SftUpdateConfig
from cs336_alignment.runs.config import RunDir, TrainingConfig


@dataclass(frozen=True)
class InstructionTuneConfig(TrainingConfig):
    """Options of instruction tuning."""

    run_dir: RunDir = Path("runs/instruction_tune")
    """Folder of the run. If it holds an unfinished run, that run is resumed."""
    train_data: Path = Path("data/sft/train.jsonl")
    """JSON lines with `prompt` and `response`, or with Alpaca's fields; gzipped if the name ends in .gz."""
    eval_data: Path | None = Path("data/sft/test.jsonl")
    """File of the same kind for the evaluation loss. None: no evaluation."""
    eval_every: int = 100
    """Evaluate after this many updates. There is also an evaluation before the first update and after the last."""
    eval_sequences: int | None = 1024
    """Evaluate on this many sequences, made from documents in a random order that is always the same.
    None: all of them."""
    seq_length: int = 512
    """Tokens per sequence. Documents are concatenated and cut without regard to where they end."""
    epochs: int = 1
    """Number of passes over the sequences."""
    batch_size: int = 32
    """Sequences per update."""
    optimizer: OptimizerConfig = OptimizerConfig(
        lr=2e-5, schedule="cosine", warmup_ratio=0.03, gradient_accumulation_steps=8
    )
    """How the policy is updated."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "eval_every", "eval_sequences", "seq_length", "epochs", "batch_size")
        self.optimizer.check_batch_size("batch_size", self.batch_size)

    @property
    def imitation(self) -> SftUpdateConfig:
        """How the policy is fine-tuned on sequences: the loss is the mean over all of their tokens."""
        return SftUpdateConfig(self.epochs, self.batch_size, normalize_constant=self.seq_length)
