"""Evaluation of a policy during training."""

from collections.abc import Sequence

from cs336_alignment.datasets.example import Example
from cs336_alignment.datasets.examples import load_examples
from cs336_alignment.datasets.overlap import HasPrompt, check_no_overlap
from cs336_alignment.rollouts.config import EvaluationConfig, RolloutConfig
from cs336_alignment.rollouts.rollout import log_generations, summarize
from cs336_alignment.rollouts.worker import RolloutWorker
from cs336_alignment.runs.data_order import shuffled_indices
from cs336_alignment.runs.training_run import TrainingRun


def load_questions(config: EvaluationConfig, train: Sequence[HasPrompt], allow_overlap: bool) -> list[Example]:
    """Read the questions to evaluate on, and check that training does not contain them.

    Returns:
        The questions; an empty list if there is no evaluation.

    Raises:
        ValueError, FileNotFoundError: the data cannot be read; or some of its problems are in `train`, and
            `allow_overlap` is False.
    """
    questions = load_examples(config.eval_data) if config.eval_data else []
    check_no_overlap(train, questions, allow_overlap)
    return questions


class Validator:
    """Evaluates the policy of a run on the same questions each time.

    Args:
        worker: None if nothing is evaluated.
        questions: empty if nothing is evaluated.
    """

    def __init__(
        self,
        run: TrainingRun,
        worker: RolloutWorker | None,
        questions: Sequence[Example],
        config: EvaluationConfig,
        rollouts: RolloutConfig,
    ) -> None:
        self._run = run
        self._worker = worker
        self._questions = subsample(questions, config.eval_examples)
        self._config = config
        # The same seed each time, so that evaluations differ by the policy alone.
        self._params = rollouts.sampling(temperature=config.eval_temperature, seed=run.config.seed)

    def validate_if_due(self, step: int, last_step: int, update: int) -> None:
        """Evaluate, and log the metrics and some responses, if this step is one to evaluate after.

        Args:
            step: steps of the program so far.
            update: updates of the policy so far.
        """
        run, worker = self._run, self._worker
        if worker is None or not self._questions or (step % self._config.eval_every and step != last_step):
            return
        worker.sync_weights(run.policy, update)
        with run.log.phase("evaluation"):
            rollouts = worker.generate(self._questions, self._params)
            worker.sleep()
            metrics = summarize(rollouts)
            path = run.config.run_dir / "generations" / f"step_{step:08d}.txt"
            log_generations(path, rollouts[: self._config.log_examples], metrics, run.policy)
        run.log.write("eval", update, metrics | run.log.pop_phase_seconds())


def subsample(examples: Sequence[Example], count: int | None) -> list[Example]:
    """Return a random subset of `count` examples, always the same; all of them if None or if there are no more."""
    if count is None or count >= len(examples):
        return list(examples)
    return [examples[index] for index in shuffled_indices(len(examples), seed=0, start=0, count=count)]
