"""Supervised fine-tuning on prompts with responses."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from cs336_alignment.data_order import Epochs, shuffled_indices
from cs336_alignment.datasets import SftExample, check_no_overlap, load_examples, load_sft
from cs336_alignment.evaluator import EvaluationConfig, Evaluator, open_rollouts_of
from cs336_alignment.masked import masked_normalize
from cs336_alignment.microbatch import sft_microbatch_train_step
from cs336_alignment.policy import TokenRow
from cs336_alignment.policy_optimizer import OptimizerConfig
from cs336_alignment.rewards import open_grader
from cs336_alignment.rollouts import RolloutConfig
from cs336_alignment.training_run import TrainingConfig, TrainingRun, check_at_least_one, open_run


@dataclass(frozen=True)
class ImitationConfig:
    """How responses are imitated."""

    epochs: int = 1
    """How often each response is seen."""
    batch_size: int = 64
    """Responses of an update."""
    normalize_constant: float = 1.0
    """The loss of a response is the sum of its tokens' over this; that of a batch is their mean."""

    def __post_init__(self) -> None:
        check_at_least_one(self, "epochs", "batch_size")
        if self.normalize_constant <= 0:
            raise ValueError(f"normalize_constant is {self.normalize_constant}, but must be positive")

    def updates(self, rows: int) -> int:
        """How many updates it takes to see so many rows `epochs` times; the last batch may be short."""
        return self._order(rows).updates

    def batch(self, rows: Sequence[TokenRow], seed: int, number: int) -> list[TokenRow]:
        """The rows of update `number`, from 1."""
        return [rows[index] for index in self._order(len(rows), seed).batch(number)]

    def _order(self, rows: int, seed: int = 0) -> Epochs:
        return Epochs(rows, self.batch_size, self.epochs, seed)


@dataclass(frozen=True)
class SftConfig(TrainingConfig):
    """Everything that supervised fine-tuning depends on."""

    run: Path = Path("runs/sft")
    """Folder of the run; an existing one is resumed."""
    train_data: Path = Path("data/math/sft.jsonl")
    """JSON lines with `prompt`, in its template, and `response`."""
    train_examples: int | None = None
    """Train on so many of them, drawn at random; fewer are among more. Default: all."""
    only_correct: bool = False
    """Leave out responses that do not get the full reward; the data then needs the answers, in `ground_truth`."""
    imitation: ImitationConfig = ImitationConfig()
    """How responses are imitated."""
    optimizer: OptimizerConfig = OptimizerConfig(gradient_accumulation_steps=32)
    """How the policy is updated."""
    rollouts: RolloutConfig = field(default_factory=RolloutConfig)
    """How responses come about in evaluations."""
    evaluation: EvaluationConfig = EvaluationConfig(eval_every=50)
    """The evaluations; their steps are updates."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_one(self, "train_examples")
        self.optimizer.check_batch_size("batch_size", self.imitation.batch_size)
        if self.only_correct and self.rollouts.reward is None:
            raise ValueError("only_correct needs a reward function, but reward is None")


def train_sft(config: SftConfig) -> dict[str, float]:
    """Fine-tune a model, or go on with it, and return its last metrics.

    Raises:
        ValueError, FileNotFoundError: the data, the model, a checkpoint or the configuration does not fit.
        FloatingPointError: training has diverged; the message names the file with the batch.
        OSError: a checkpoint cannot be written.
    """
    examples = _select(load_sft(config.train_data), config)
    questions = load_examples(config.evaluation.eval_data) if config.evaluation.eval_data else []
    check_no_overlap(examples, questions, config.allow_overlap)
    with open_run(config) as run, ExitStack() as stack:
        rollouts = stack.enter_context(open_rollouts_of(run, config.rollouts)) if questions else None
        evaluator = Evaluator(run, rollouts, questions, config.evaluation, config.rollouts)

        rows = _tokenize(examples, config, run)
        total = config.imitation.updates(len(rows))
        run.log.expect(total)
        if run.start == 0:
            evaluator.evaluate_if_due(0, total, update=0)
        for step in run.steps(total):
            batch = config.imitation.batch(rows, config.seed, step)
            metrics = imitate(run, batch, config.imitation, step, config.optimizer.lr_at(step, total))
            run.log.write("train", step, metrics)
            run.progress["update"] = step
            evaluator.evaluate_if_due(step, total, update=step)
            run.log.show_line()
        return run.log.latest


def imitate(
    run: TrainingRun, batch: Sequence[TokenRow], config: ImitationConfig, update: int, lr: float
) -> dict[str, float]:
    """Update the policy once, towards the responses of a batch.

    Returns:
        Metrics for the log: those of `PolicyOptimizer.update`; `token_loss`, the mean of −log p over all tokens of
        responses; `token_entropy`, that of the policy's entropy; seconds of each phase since the last metrics; and
        `tokens_per_second`, prompts included.
    """
    tokens = sum(len(row.response) for row in batch)

    def train_step(indices: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
        part = run.policy.response_log_probs([batch[index] for index in indices], return_token_entropy=True)
        assert part.token_entropy is not None
        loss, sums = sft_microbatch_train_step(
            part.log_probs, part.mask, 1, config.normalize_constant, total_sequences=len(batch)
        )
        return loss, {
            "token_loss": sums["negative_log_likelihood"] / tokens,
            "token_entropy": masked_normalize(part.token_entropy, part.mask) / tokens,
        }

    def as_json() -> list[dict[str, Any]]:
        decode = run.policy.tokenizer.decode
        return [{"prompt": decode(list(row.prompt)), "response": decode(list(row.response))} for row in batch]

    microbatches = run.config.optimizer.microbatches([len(row) for row in batch], config.batch_size)
    metrics = run.update(update, microbatches, train_step, lr, as_json)
    seconds = run.log.take_seconds()
    return {**metrics, **seconds, "tokens_per_second": sum(map(len, batch)) / seconds["seconds/update"]}


def _select(examples: list[SftExample], config: SftConfig) -> list[SftExample]:
    """What to train on."""
    if config.only_correct:
        examples = _correct(examples, config)
    if config.train_examples is None:
        return examples
    if config.train_examples > len(examples):
        raise ValueError(f"train_examples is {config.train_examples}, but {config.train_data} has {len(examples)}")
    order = shuffled_indices(len(examples), config.seed, 0, config.train_examples)
    return [examples[index] for index in order]


def _correct(examples: Sequence[SftExample], config: SftConfig) -> list[SftExample]:
    answers = [example.answer for example in examples if example.answer is not None]
    if len(answers) < len(examples):
        number = next(number for number, example in enumerate(examples, start=1) if example.answer is None)
        raise ValueError(
            f"only_correct needs the answers, but row {number} of {config.train_data} has no field ground_truth"
        )
    with open_grader(str(config.rollouts.reward), config.rollouts.grading_workers) as grade:
        rewards = grade([example.response for example in examples], answers)
    correct = [example for example, graded in zip(examples, rewards) if graded["reward"] >= 1]
    if not correct:
        raise ValueError(f"{config.train_data} has no response that gets the full reward {config.rollouts.reward!r}")
    return correct


def _tokenize(examples: Sequence[SftExample], config: SftConfig, run: TrainingRun) -> list[TokenRow]:
    """The examples in tokens; those that do not fit into the model's context are left out."""
    rows = [run.policy.tokenize(example.prompt, example.response) for example in examples]
    fitting = [row for row in rows if len(row) <= run.policy.context_length]
    if not fitting:
        raise ValueError(
            f"no example of {config.train_data} fits into the model's context of {run.policy.context_length} tokens"
        )
    if len(fitting) < len(rows):
        run.log.console.print(
            f"{len(rows) - len(fitting)} of {len(rows)} examples are longer than the model's context of "
            f"{run.policy.context_length} tokens and are left out",
            soft_wrap=True,
        )
    return fitting
