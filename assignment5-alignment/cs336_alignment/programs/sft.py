"""Supervised fine-tuning on prompts with responses."""

from collections.abc import Sequence
from contextlib import ExitStack

from cs336_alignment.datasets.demonstrations import Demonstration, load_demonstrations
from cs336_alignment.policy.optimizer import split_into_microbatches
from cs336_alignment.policy.policy import TokenizedExample
from cs336_alignment.programs.configs.sft import SftConfig, SftUpdateConfig
from cs336_alignment.rollouts.grader import open_grader
from cs336_alignment.rollouts.validation import Validator, load_questions
from cs336_alignment.rollouts.worker import open_training_worker
from cs336_alignment.runs.data_order import Epochs, shuffled_indices
from cs336_alignment.runs.training_run import TrainingRun, open_run
from cs336_alignment.tensors.losses import sft_loss
from cs336_alignment.tensors.masked import masked_normalize


def train_sft(config: SftConfig) -> dict[str, float]:
    """Fine-tune a model, or resume doing so, and return its last metrics.

    Raises:
        ValueError, FileNotFoundError: the data, the model, a checkpoint or the configuration is not usable.
        FloatingPointError: training has diverged; the message names the file with the batch.
        OSError: a checkpoint cannot be written.
    """
    demonstrations = select_demonstrations(load_demonstrations(config.train_data), config)
    questions = load_questions(config.evaluation, demonstrations, config.allow_overlap)
    with open_run(config) as run, ExitStack() as stack:
        worker = stack.enter_context(open_training_worker(run, config.rollouts)) if questions else None
        validator = Validator(run, worker, questions, config.evaluation, config.rollouts)
        examples = tokenize_demonstrations(demonstrations, run, config)
        epochs = Epochs(len(examples), config.imitation.batch_size, config.imitation.epochs, config.seed)
        run.log.expect(epochs.updates)
        if run.start == 0:
            validator.validate_if_due(0, epochs.updates, update=0)
        for update in run.steps(epochs.updates):
            batch = [examples[index] for index in epochs.batch(update)]
            lr = config.optimizer.lr_at(update, epochs.updates)
            run.log.write("train", update, sft_update(run, batch, config.imitation, update, lr))
            run.progress["update"] = update
            validator.validate_if_due(update, epochs.updates, update)
        return run.log.latest


def sft_update(
    run: TrainingRun, batch: Sequence[TokenizedExample], config: SftUpdateConfig, update: int, lr: float
) -> dict[str, float]:
    """Update the policy once, to make the responses of a batch more probable.

    Returns:
        Metrics: `loss`, `grad_norm`, `lr`; `token_loss`, the mean of −log p over all response tokens; `token_entropy`,
        the mean entropy of the policy there; the seconds of each phase since the last metrics; and
        `tokens_per_second`, prompts included.
    """
    response_tokens = sum(len(example.response) for example in batch)
    lengths = [len(example) for example in batch]
    with run.optimizer_step(update, lr, batch) as gradients:
        for indices in split_into_microbatches(lengths, run.config.optimizer, config.batch_size):
            now = run.policy.response_log_probs([batch[index] for index in indices], return_token_entropy=True)
            assert now.token_entropy is not None
            gradients.backward(
                sft_loss(now.log_probs, now.mask, config.normalize_constant, total_sequences=len(batch)),
                token_loss=masked_normalize(-now.log_probs.detach(), now.mask) / response_tokens,
                token_entropy=masked_normalize(now.token_entropy, now.mask) / response_tokens,
            )
    seconds = run.log.pop_phase_seconds()
    return {**gradients.metrics, **seconds, "tokens_per_second": sum(lengths) / seconds["seconds/update"]}


def select_demonstrations(demonstrations: list[Demonstration], config: SftConfig) -> list[Demonstration]:
    """Choose what to train on: the correct responses if asked for, and a random subset if asked for."""
    if config.only_correct:
        demonstrations = _correct(demonstrations, config)
    if config.train_examples is None:
        return demonstrations
    if config.train_examples > len(demonstrations):
        raise ValueError(
            f"train_examples is {config.train_examples}, but {config.train_data} has {len(demonstrations)}"
        )
    order = shuffled_indices(len(demonstrations), config.seed, 0, config.train_examples)
    return [demonstrations[index] for index in order]


def _correct(demonstrations: Sequence[Demonstration], config: SftConfig) -> list[Demonstration]:
    answers = [each.answer for each in demonstrations if each.answer is not None]
    if len(answers) < len(demonstrations):
        number = next(number for number, each in enumerate(demonstrations, start=1) if each.answer is None)
        raise ValueError(
            f"only_correct needs the answers, but row {number} of {config.train_data} has no field ground_truth"
        )
    with open_grader(str(config.rollouts.reward), config.rollouts.grading_workers) as grade:
        rewards = grade([each.response for each in demonstrations], answers)
    correct = [each for each, graded in zip(demonstrations, rewards) if graded["reward"] >= 1]
    if not correct:
        raise ValueError(
            f"{config.train_data} has no response that receives the full reward {config.rollouts.reward!r}"
        )
    return correct


def tokenize_demonstrations(
    demonstrations: Sequence[Demonstration], run: TrainingRun, config: SftConfig
) -> list[TokenizedExample]:
    """Tokenize the demonstrations, and leave out those that do not fit into the model's context."""
    examples = [run.policy.tokenize(each.prompt, each.response) for each in demonstrations]
    fitting = [example for example in examples if len(example) <= run.policy.context_length]
    if not fitting:
        raise ValueError(
            f"no example of {config.train_data} fits into the model's context of {run.policy.context_length} tokens"
        )
    if len(fitting) < len(examples):
        run.log.console.print(
            f"{len(examples) - len(fitting)} of {len(examples)} examples are longer than the model's context of "
            f"{run.policy.context_length} tokens and are left out",
            soft_wrap=True,
        )
    return fitting
