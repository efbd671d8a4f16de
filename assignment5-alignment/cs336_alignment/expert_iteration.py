"""Expert iteration (Anthony et al. 2017; Zelikman et al. 2022): a model imitates its own correct responses."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

from cs336_alignment.data_order import seed_of_draw, shuffled_indices
from cs336_alignment.datasets import check_no_overlap, load_examples
from cs336_alignment.evaluator import EvaluationConfig, Evaluator, open_rollouts_of
from cs336_alignment.generation_log import Generation, summarize
from cs336_alignment.policy_optimizer import OptimizerConfig
from cs336_alignment.rollouts import RolloutConfig
from cs336_alignment.run_log import write_atomically
from cs336_alignment.sft import ImitationConfig, imitate
from cs336_alignment.training_run import TrainingConfig, check_at_least_one, open_run


@dataclass(frozen=True)
class ExpertIterationConfig(TrainingConfig):
    """Everything that expert iteration depends on."""

    run: Path = Path("runs/expert_iteration")
    """Folder of the run; an existing one is resumed."""
    train_data: Path = Path("data/math/train.jsonl")
    """Questions with answers."""
    n_ei_steps: int = 5
    """Steps, each of rollouts and of fine-tuning on the correct ones."""
    question_batch_size: int = 512
    """Questions of a step."""
    rollouts_per_question: int = 8
    """Responses to each of them."""
    min_tokens: int = 4
    """The fewest tokens of a response."""
    checkpoint_every: int = 1
    """Steps between checkpoints; the last step always gets one."""
    imitation: ImitationConfig = ImitationConfig()
    """How correct responses are imitated in a step."""
    optimizer: OptimizerConfig = OptimizerConfig(gradient_accumulation_steps=32)
    """How the policy is updated; a schedule of the learning rate begins anew in each step."""
    rollouts: RolloutConfig = field(default_factory=RolloutConfig)
    """How responses come about, and what they are worth."""
    evaluation: EvaluationConfig = EvaluationConfig(eval_every=1)
    """The evaluations."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_one(self, "n_ei_steps", "question_batch_size", "rollouts_per_question")
        self.optimizer.check_batch_size("batch_size", self.imitation.batch_size)
        if self.rollouts.reward is None:
            raise ValueError("expert iteration needs a reward function, but reward is None")
        self.rollouts.sampling(min_tokens=self.min_tokens)


def run_expert_iteration(config: ExpertIterationConfig) -> dict[str, float]:
    """Improve a model on questions, or go on with it, and return its last metrics.

    The correct responses of each step stay in the run's folder, as `correct/step_*.jsonl`: data that `sft` can read.

    Raises:
        ValueError, FileNotFoundError: the data, the model, a checkpoint or the configuration does not fit.
        FloatingPointError: training has diverged; the message names the file with the batch.
        OSError: a checkpoint cannot be written.
    """
    examples = load_examples(config.train_data)
    questions = load_examples(config.evaluation.eval_data) if config.evaluation.eval_data else []
    check_no_overlap(examples, questions, config.allow_overlap)
    params = config.rollouts.sampling(min_tokens=config.min_tokens, n=config.rollouts_per_question)
    with open_run(config) as run, open_rollouts_of(run, config.rollouts) as rollouts:
        evaluator = Evaluator(run, rollouts, questions, config.evaluation, config.rollouts)
        update = run.progress["update"]
        if run.start == 0:
            evaluator.evaluate_if_due(0, config.n_ei_steps, update)
        for step in run.steps(config.n_ei_steps):
            batch_size = config.question_batch_size
            indices = shuffled_indices(len(examples), config.seed, (step - 1) * batch_size, batch_size)
            rollouts.load(run.policy, update)
            draw = replace(params, seed=seed_of_draw(config.seed, step))
            generations = rollouts.respond([examples[index] for index in indices], draw)
            rollouts.rest()
            correct = [each for each in generations if each.correct and each.completion.token_ids]
            _keep(config.run / "correct" / f"step_{step:08d}.jsonl", correct)
            outcome = {"ei_step": step, "correct_responses": len(correct), **summarize(generations)}

            rows = [each.row(run.policy) for each in correct]
            total = config.imitation.updates(len(rows))
            if total == 0:
                update += 1
                run.log.write("train", update, {"skipped": 1, **outcome, **run.log.take_seconds()})
            for number in range(1, total + 1):
                update += 1
                batch = config.imitation.batch(rows, config.seed, number)
                metrics = imitate(run, batch, config.imitation, update, config.optimizer.lr_at(number, total))
                run.log.write("train", update, {"skipped": 0, **metrics, **outcome})
            run.progress["update"] = update
            evaluator.evaluate_if_due(step, config.n_ei_steps, update)
            run.log.show_line()
        return run.log.latest


def _keep(path: Path, generations: list[Generation]) -> None:
    write_atomically(path, "".join(json.dumps(each.as_json(), ensure_ascii=False) + "\n" for each in generations))
