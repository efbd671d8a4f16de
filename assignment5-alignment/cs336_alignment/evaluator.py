"""Evaluations of a policy while it is trained."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from cs336_alignment.data_order import shuffled_indices
from cs336_alignment.example import Example
from cs336_alignment.generation_log import log_generations, summarize
from cs336_alignment.rollouts import POLICY_BYTES, RolloutConfig, Rollouts, open_rollouts
from cs336_alignment.training_run import TrainingRun, check_at_least_one


@dataclass(frozen=True)
class EvaluationConfig:
    """When and on what a policy is evaluated during its training."""

    eval_data: Path | None = Path("data/math/test.jsonl")
    """Questions that the policy is evaluated on; None for no evaluation."""
    eval_examples: int | None = 1024
    """Take so many of the questions, drawn at random but always the same; None for all."""
    eval_every: int = 10
    """Steps between evaluations. There is also one before the first step and one after the last."""
    eval_temperature: float = 1.0
    """Of sampling; 0 takes the most probable token."""
    log_examples: int = 8
    """Generations of each evaluation that are written to generations/ as text."""

    def __post_init__(self) -> None:
        check_at_least_one(self, "eval_examples", "eval_every")
        if self.eval_temperature < 0 or self.log_examples < 0:
            raise ValueError(
                f"eval_temperature {self.eval_temperature} and log_examples {self.log_examples} must not be negative"
            )


class Evaluator:
    """Evaluates the policy of a run, on the same questions each time.

    Args:
        rollouts: None where nothing is evaluated.
        examples: the questions; none for no evaluation.
    """

    def __init__(
        self,
        run: TrainingRun,
        rollouts: Rollouts | None,
        examples: Sequence[Example],
        config: EvaluationConfig,
        sampling: RolloutConfig,
    ) -> None:
        self._run = run
        self._rollouts = rollouts
        self._examples = some_of(examples, config.eval_examples)
        self._config = config
        # The same draws each time, so that evaluations differ by the policy alone.
        self._params = sampling.sampling(temperature=config.eval_temperature, seed=run.config.seed)

    def evaluate_if_due(self, step: int, last_step: int, update: int) -> None:
        """Evaluate, and log the metrics and some generations, if it is this step's turn.

        Args:
            step: steps of the program so far.
            update: updates of the policy so far.
        """
        run, rollouts = self._run, self._rollouts
        if rollouts is None or not self._examples or (step % self._config.eval_every and step != last_step):
            return
        rollouts.load(run.policy, update)
        with run.log.phase("evaluation"):
            generations = rollouts.respond(self._examples, self._params)
            rollouts.rest()
            metrics = summarize(generations)
            path = run.config.run / "generations" / f"step_{step:08d}.txt"
            log_generations(path, generations[: self._config.log_examples], metrics, run.policy)
        run.log.write("eval", update, metrics | run.log.take_seconds())


def open_rollouts_of(
    run: TrainingRun, config: RolloutConfig, bytes_per_parameter: int = POLICY_BYTES
) -> AbstractContextManager[Rollouts]:
    """Start an engine and a grader for the policy of a run, whose log times them; see `open_rollouts`."""
    return open_rollouts(
        config,
        run.source,
        run.config.precision,
        policy=run.policy,
        seed=run.config.seed,
        bytes_per_parameter=bytes_per_parameter,
        phase=run.log.phase,
    )


def some_of(examples: Sequence[Example], count: int | None) -> list[Example]:
    """`count` of the examples, the same each time; all if None or if there are no more."""
    if count is None or count >= len(examples):
        return list(examples)
    return [examples[index] for index in shuffled_indices(len(examples), seed=0, start=0, count=count)]
