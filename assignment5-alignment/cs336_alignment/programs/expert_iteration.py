"""Expert iteration (Anthony et al. 2017; Zelikman et al. 2022): a model is fine-tuned on its own correct responses."""

import json
from dataclasses import replace
from pathlib import Path

from cs336_alignment.datasets.examples import load_examples
from cs336_alignment.programs.configs.expert_iteration import ExpertIterationConfig
from cs336_alignment.programs.sft import sft_update
from cs336_alignment.rollouts.rollout import Rollout, summarize
from cs336_alignment.rollouts.validation import Validator, load_questions
from cs336_alignment.rollouts.worker import open_training_worker
from cs336_alignment.run_folder import write_atomically
from cs336_alignment.runs.data_order import Epochs, seed_of_draw, shuffled_indices
from cs336_alignment.runs.training_run import open_run


def run_expert_iteration(config: ExpertIterationConfig) -> dict[str, float]:
    """Improve a model on questions, or resume doing so, and return its last metrics.

    The correct responses of each step stay in the run folder, as `correct/step_*.jsonl`, which `sft` can read.

    Raises:
        ValueError, FileNotFoundError: the data, the model, a checkpoint or the configuration is not usable.
        FloatingPointError: training has diverged; the message names the file with the batch.
        OSError: a checkpoint cannot be written.
    """
    examples = load_examples(config.train_data)
    questions = load_questions(config.evaluation, examples, config.allow_overlap)
    params = config.rollouts.sampling(min_tokens=config.min_tokens, n=config.rollouts_per_question)
    with open_run(config) as run, open_training_worker(run, config.rollouts) as worker:
        validator = Validator(run, worker, questions, config.evaluation, config.rollouts)
        update = run.progress["update"]
        if run.start == 0:
            validator.validate_if_due(0, config.n_ei_steps, update)
        for step in run.steps(config.n_ei_steps):
            # Sample and grade
            count = config.question_batch_size
            indices = shuffled_indices(len(examples), config.seed, (step - 1) * count, count)
            worker.sync_weights(run.policy, update)
            seeded = replace(params, seed=seed_of_draw(config.seed, step))
            rollouts = worker.generate([examples[index] for index in indices], seeded)
            worker.sleep()

            # Keep what is correct
            correct = [each for each in rollouts if each.correct and each.completion.token_ids]
            save_rollouts(config.run_dir / "correct" / f"step_{step:08d}.jsonl", correct)
            outcome = {"ei_step": step, "correct_responses": len(correct), **summarize(rollouts)}

            # Fine-tune on it
            tokenized = [each.tokenize(run.policy) for each in correct]
            epochs = Epochs(len(tokenized), config.imitation.batch_size, config.imitation.epochs, config.seed)
            if not tokenized:
                update += 1
                run.log.write("train", update, {"skipped": 1, **outcome, **run.log.pop_phase_seconds()})
            for number in range(1, epochs.updates + 1):
                update += 1
                batch = [tokenized[index] for index in epochs.batch(number)]
                lr = config.optimizer.lr_at(number, epochs.updates)
                metrics = sft_update(run, batch, config.imitation, update, lr)
                run.log.write("train", update, {"skipped": 0, **metrics, **outcome})
            run.progress["update"] = update
            validator.validate_if_due(step, config.n_ei_steps, update)
        return run.log.latest


def save_rollouts(path: Path, rollouts: list[Rollout]) -> None:
    """Write rollouts as JSON lines."""
    write_atomically(path, "".join(json.dumps(each.as_json(), ensure_ascii=False) + "\n" for each in rollouts))
