"""Instruction tuning (Ouyang et al. 2022): next-token prediction on packed documents of prompts with responses."""

from dataclasses import dataclass
from pathlib import Path

import torch

from cs336_alignment.data_order import Epochs
from cs336_alignment.datasets import PackedSftDataset, check_no_overlap, load_sft
from cs336_alignment.masked import masked_normalize
from cs336_alignment.policy import Policy, TokenRow
from cs336_alignment.policy_optimizer import OptimizerConfig
from cs336_alignment.sft import ImitationConfig, imitate
from cs336_alignment.training_run import TrainingConfig, TrainingRun, check_at_least_one, open_run


@dataclass(frozen=True)
class InstructionTuneConfig(TrainingConfig):
    """Everything that instruction tuning depends on."""

    run: Path = Path("runs/instruction_tune")
    """Folder of the run; an existing one is resumed."""
    train_data: Path = Path("data/sft/train.jsonl")
    """JSON lines with `prompt` and `response`, or Alpaca's fields; gzipped if the name ends in .gz."""
    eval_data: Path | None = Path("data/sft/test.jsonl")
    """A file of the same kind for the evaluation loss; None for no evaluation."""
    eval_every: int = 100
    """Updates between evaluations. There is also one before the first update and one after the last."""
    eval_sequences: int | None = 1024
    """Evaluate on so many sequences, of documents drawn at random but always the same; None for all."""
    seq_length: int = 512
    """Tokens of a sequence: documents are joined, and cut without regard to where they end."""
    epochs: int = 1
    """How often each sequence is seen."""
    batch_size: int = 32
    """Sequences of an update."""
    optimizer: OptimizerConfig = OptimizerConfig(
        lr=2e-5, schedule="cosine", warmup_ratio=0.03, gradient_accumulation_steps=8
    )
    """How the policy is updated."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_one(self, "eval_every", "eval_sequences", "seq_length", "epochs", "batch_size")
        self.optimizer.check_batch_size("batch_size", self.batch_size)

    @property
    def imitation(self) -> ImitationConfig:
        """How a batch of sequences is imitated: the loss is the mean over all of its tokens."""
        return ImitationConfig(self.epochs, self.batch_size, normalize_constant=self.seq_length)


def instruction_tune(config: InstructionTuneConfig) -> dict[str, float]:
    """Tune a model on instructions, or go on with it, and return its last metrics.

    `train/*` are those of `imitate`; `eval/loss` is the mean of −log p over the tokens of the evaluation's sequences.

    Raises:
        ValueError, FileNotFoundError: the data, the model, a checkpoint or the configuration does not fit.
        FloatingPointError: training has diverged; the message names the file with the batch.
        OSError: a checkpoint cannot be written.
    """
    if config.eval_data is not None:
        check_no_overlap(load_sft(config.train_data), load_sft(config.eval_data), config.allow_overlap)
    with open_run(config) as run:
        train = _pack(run, config.train_data, config.seq_length, config.seed)
        evaluation = _pack(run, config.eval_data, config.seq_length, seed=0) if config.eval_data else None
        epochs = Epochs(len(train), config.batch_size, config.epochs, config.seed)
        run.log.expect(epochs.updates)

        def evaluate_if_due(step: int) -> None:
            if evaluation is None or (step % config.eval_every and step != epochs.updates):
                return
            with run.log.phase("evaluation"):
                loss = mean_loss(run.policy, evaluation, config)
            run.log.write("eval", step, {"loss": loss, **run.log.take_seconds()})

        if run.start == 0:
            evaluate_if_due(0)
        for step in run.steps(epochs.updates):
            batch = [as_row(train, index) for index in epochs.batch(step)]
            metrics = imitate(run, batch, config.imitation, step, config.optimizer.lr_at(step, epochs.updates))
            run.log.write("train", step, metrics)
            run.progress["update"] = step
            evaluate_if_due(step)
            run.log.show_line()
        return run.log.latest


def as_row(dataset: PackedSftDataset, index: int) -> TokenRow:
    """A chunk as a prompt of one token, which nothing predicts, and a response: all of its labels."""
    chunk = dataset[index]
    return TokenRow((int(chunk["input_ids"][0]),), tuple(chunk["labels"].tolist()))


@torch.no_grad()
def mean_loss(policy: Policy, dataset: PackedSftDataset, config: InstructionTuneConfig) -> float:
    """The mean of −log p over the tokens of the data set's first `eval_sequences` chunks."""
    count = min(len(dataset), config.eval_sequences or len(dataset))
    model = policy.model.eval()
    total = 0.0
    for indices in config.optimizer.microbatches([config.seq_length + 1] * count, config.batch_size):
        batch = policy.response_log_probs([as_row(dataset, index) for index in indices])
        total -= masked_normalize(batch.log_probs, batch.mask).item()
    model.train()
    return total / (count * config.seq_length)


def _pack(run: TrainingRun, path: Path, seq_length: int, seed: int) -> PackedSftDataset:
    context = run.policy.context_length
    if seq_length > context:
        raise ValueError(f"seq_length is {seq_length}, but the model's context is {context}; choose at most that")
    return PackedSftDataset(run.policy.tokenizer, path, seq_length, shuffle=True, seed=seed)
