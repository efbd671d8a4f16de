"""Group relative policy optimization (Shao et al. 2024) and its relatives, from top to bottom.

A step of `train_grpo` samples groups of responses and grades them (`sample_groups`), compares the rewards within each
group (`make_samples`), and updates the policy (`grpo_update`), whose loss is `losses.policy_gradient_loss`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from cs336_alignment.datasets.example import Example
from cs336_alignment.datasets.examples import load_examples
from cs336_alignment.policy.loading import load_model
from cs336_alignment.policy.optimizer import split_into_microbatches
from cs336_alignment.policy.policy import Policy, ResponseLogProbs, TokenizedExample, scatter_to_mask
from cs336_alignment.programs.configs.grpo import GrpoConfig
from cs336_alignment.rollouts.rollout import Rollout, summarize
from cs336_alignment.rollouts.validation import Validator, load_questions
from cs336_alignment.rollouts.worker import POLICY_BYTES, RolloutWorker, open_training_worker
from cs336_alignment.runs.data_order import seed_of_draw, shuffled_indices
from cs336_alignment.runs.training_run import TrainingRun, open_run
from cs336_alignment.tensors.advantages import group_advantages
from cs336_alignment.tensors.losses import policy_gradient_loss
from cs336_alignment.tensors.masked import masked_normalize

#: Bytes per parameter of the frozen reference model, which is in float32.
REFERENCE_BYTES = 4


def train_grpo(config: GrpoConfig) -> dict[str, float]:
    """Train a model with rewards, or resume doing so, and return its last metrics.

    Raises:
        ValueError, FileNotFoundError: the data, the model, a checkpoint or the configuration is not usable.
        FloatingPointError: training has diverged; the message names the file with the batch.
        OSError: a checkpoint cannot be written.
    """
    examples = load_examples(config.train_data)
    questions = load_questions(config.evaluation, examples, config.allow_overlap)
    memory = POLICY_BYTES + (REFERENCE_BYTES if config.kl_coefficient else 0)
    with open_run(config) as run, open_training_worker(run, config.rollouts, memory) as worker:
        validator = Validator(run, worker, questions, config.evaluation, config.rollouts)
        reference = None
        if config.kl_coefficient:
            reference = replace(run.policy, model=load_model(config.model, run.policy.device))
        run.log.expect(config.n_grpo_steps * config.updates_per_step)
        if run.start == 0:
            validator.validate_if_due(0, config.n_grpo_steps, update=0)
        for step in run.steps(config.n_grpo_steps):
            # Sample groups of responses with the current weights, and grade them
            update = (step - 1) * config.updates_per_step
            worker.sync_weights(run.policy, update)
            groups, kept = sample_groups(config, run, worker, examples)
            worker.sleep()
            outcome = {"grpo_step": step, **summarize_groups(groups)}

            # Compare the rewards within each group
            samples = make_samples(config, run, reference, [rollout for group in kept for rollout in group])

            # Update the policy with the responses
            for indices in update_batches(config, len(samples), step):
                update += 1
                batch = [samples[index] for index in indices]
                metrics = grpo_update(config, run, batch, update)
                seconds = run.log.pop_phase_seconds()
                metrics |= tokens_per_second(groups, batch, seconds)
                run.log.write("train", update, {**metrics, **outcome, **seconds})
            run.progress["update"] = step * config.updates_per_step
            validator.validate_if_due(step, config.n_grpo_steps, run.progress["update"])
        return run.log.latest


@dataclass(frozen=True)
class Sample:
    """A response to learn from, and what its loss needs."""

    rollout: Rollout
    tokens: TokenizedExample
    reward: float
    advantage: float
    old_log_probs: Float[Tensor, " response"] | None
    """Log-probabilities of the response before the first update of the step. None if there is only one update."""
    reference_log_probs: Float[Tensor, " response"] | None
    """Log-probabilities under the model that training started with. None if the loss does not depend on them."""

    def as_json(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """Return the sample as plain data for JSON."""
        return {**self.rollout.as_json(), "advantage": self.advantage, "token_ids": self.tokens.response}


def sample_groups(
    config: GrpoConfig, run: TrainingRun, worker: RolloutWorker, examples: Sequence[Example]
) -> tuple[list[list[Rollout]], list[list[Rollout]]]:
    """Sample and grade groups of responses: all groups, and those to learn from.

    If the recipe skips groups whose rewards are all equal, other questions replace them ("dynamic sampling", Yu et al.
    2025, section 3.2), for at most `max_rollout_rounds` rounds.
    """
    size, skip_equal_groups = config.group_size, config.recipe.skip_equal_groups
    wanted = config.rollout_batch_size // size
    params = config.rollouts.sampling(n=size, min_tokens=config.min_tokens)
    groups: list[list[Rollout]] = []
    kept: list[list[Rollout]] = []
    for _ in range(config.max_rollout_rounds if skip_equal_groups else 1):
        missing, drawn = wanted - len(kept), run.progress.get("questions_drawn", 0)
        indices = shuffled_indices(len(examples), config.seed, drawn, missing)
        run.progress["questions_drawn"] = drawn + missing
        seeded = replace(params, seed=seed_of_draw(config.seed, drawn))
        rollouts = worker.generate([examples[index] for index in indices], seeded)
        new = [rollouts[start : start + size] for start in range(0, len(rollouts), size)]
        groups += new
        kept += [group for group in new if not (skip_equal_groups and has_equal_rewards(group))]
        if len(kept) == wanted:
            break
    return groups, kept


def make_samples(
    config: GrpoConfig, run: TrainingRun, reference: Policy | None, rollouts: list[Rollout]
) -> list[Sample]:
    """Compute the advantages of responses and, where the loss needs them, old and reference log-probabilities."""
    if not rollouts:
        return []
    policy, temperature = run.policy, config.rollouts.temperature
    rewards = torch.tensor([rollout.rewards["reward"] for rollout in rollouts], dtype=torch.float32)
    normalize_by_std = config.recipe.normalize_by_std and config.group_size > 1
    advantages, _ = group_advantages(rewards, config.group_size, config.advantage_eps, normalize_by_std)

    tokens = [rollout.tokenize(policy) for rollout in rollouts]
    microbatches = split_into_microbatches([len(each) for each in tokens], config.optimizer, config.train_batch_size)
    old: Sequence[Tensor | None] = [None] * len(tokens)
    reference_log_probs = old
    if config.off_policy:
        with run.log.phase("old_log_probs"):
            old = policy.log_probs_no_grad(tokens, microbatches, temperature)
    if reference:
        with run.log.phase("reference_log_probs"):
            reference_log_probs = reference.log_probs_no_grad(tokens, microbatches, temperature)
    columns = (rollouts, tokens, rewards.tolist(), advantages.tolist(), old, reference_log_probs)
    return [Sample(*row) for row in zip(*columns, strict=True)]


def update_batches(config: GrpoConfig, count: int, step: int) -> Iterator[list[int]]:
    """Yield the indices of the responses for each update of a step: each epoch uses all of them, in a new order."""
    for epoch in range(config.epochs_per_rollout_batch):
        order = np.random.default_rng((config.seed, step, epoch)).permutation(count).tolist()
        for start in range(0, max(1, count), config.train_batch_size):
            yield order[start : start + config.train_batch_size]


def grpo_update(config: GrpoConfig, run: TrainingRun, batch: Sequence[Sample], update: int) -> dict[str, float]:
    """Update the policy once, and return metrics.

    There is no update if the batch teaches nothing, because no response is better than the others of its group.
    Otherwise AdamW would still move the weights, by its momentum.
    """
    by_reward = config.recipe.weight == "raw_rewards"
    weights = [sample.reward if by_reward else sample.advantage for sample in batch]
    response_tokens = sum(len(sample.tokens.response) for sample in batch)
    if response_tokens == 0 or not (any(weights) or config.kl_coefficient):
        return {"skipped": 1}
    gaps: list[Tensor] = []
    lengths = [len(sample.tokens) for sample in batch]
    lr = config.optimizer.lr_at(update, config.n_grpo_steps * config.updates_per_step)
    with run.optimizer_step(update, lr, batch) as gradients:
        for indices in split_into_microbatches(lengths, config.optimizer, config.train_batch_size):
            part = [batch[index] for index in indices]
            tokens = [sample.tokens for sample in part]
            now = run.policy.response_log_probs(tokens, config.rollouts.temperature, return_token_entropy=True)
            old = log_probs_of([sample.old_log_probs for sample in part], now)
            if old is None:  # the only update of this step: the policy is still the one that sampled
                old = now.log_probs.detach()
            loss, metadata = policy_gradient_loss(
                now.log_probs,
                now.mask,
                config.loss_type,
                column([sample.reward for sample in part], old),
                column([sample.advantage for sample in part], old),
                old,
                config.cliprange,
                cliprange_high=config.recipe.cliprange_high,
                reference_log_probs=log_probs_of([sample.reference_log_probs for sample in part], now),
                kl_coefficient=config.kl_coefficient,
                aggregation=config.recipe.aggregation,
                normalize_constant=config.normalize_constant or config.rollouts.max_tokens,
                total_tokens=response_tokens,
                total_sequences=len(batch),
            )
            gradients.backward(loss, **token_means(now, metadata, response_tokens))
            engine = [torch.tensor(sample.rollout.completion.log_probs) for sample in part]
            gaps.append((old - scatter_to_mask(engine, now.mask))[now.mask].abs())
    metrics = {"skipped": 0, **gradients.metrics}
    if config.rollouts.temperature == 1:  # the engine's log-probabilities are those before temperature
        gap = torch.cat(gaps)
        metrics |= {"log_prob_gap": gap.mean().item(), "log_prob_gap_max": gap.max().item()}
    return metrics


def log_probs_of(values: Sequence[Tensor | None], now: ResponseLogProbs) -> Float[Tensor, "batch seq"] | None:
    """Arrange log-probabilities of each response, [response], like those of the policy; None if they are not known."""
    known = [value for value in values if value is not None]
    return scatter_to_mask(known, now.mask) if known else None


def column(values: Sequence[float], like: Tensor) -> Float[Tensor, "batch 1"]:
    """Make a column of one number per response."""
    return torch.tensor(values, dtype=torch.float32, device=like.device).unsqueeze(1)


def token_means(now: ResponseLogProbs, metadata: dict[str, Tensor], response_tokens: int) -> dict[str, Tensor]:
    """Compute a microbatch's share of means over all response tokens of the batch."""
    values = {"token_entropy": now.token_entropy, "clip_fraction": metadata.get("clipped"), "kl": metadata.get("kl")}
    return {
        name: masked_normalize(value.float(), now.mask, normalize_constant=response_tokens)
        for name, value in values.items()
        if value is not None
    }


def tokens_per_second(
    groups: Sequence[Sequence[Rollout]], batch: Sequence[Sample], seconds: dict[str, float]
) -> dict[str, float]:
    """Compute the rates of sampling, for the first update of a step, and of training, prompts included."""
    rates = {}
    if "seconds/rollout" in seconds:
        sampled = sum(len(rollout.completion.token_ids) for group in groups for rollout in group)
        rates["rollout_tokens_per_second"] = sampled / seconds["seconds/rollout"]
    if "seconds/update" in seconds:
        rates["tokens_per_second"] = sum(len(sample.tokens) for sample in batch) / seconds["seconds/update"]
    return rates


def has_equal_rewards(group: Sequence[Rollout]) -> bool:
    """Whether all responses of a group received the same reward."""
    return len({rollout.rewards["reward"] for rollout in group}) == 1


def summarize_groups(groups: Sequence[Sequence[Rollout]]) -> dict[str, float]:
    """Compute `summarize`, `reward_std` over all responses, and `frac_reward_zero_std`.

    `frac_reward_zero_std` is the fraction of groups whose rewards are all equal, by TRL's name for it.
    """
    rollouts = [rollout for group in groups for rollout in group]
    rewards = [rollout.rewards["reward"] for rollout in rollouts]
    return {
        **summarize(rollouts),
        "reward_std": stdev(rewards) if len(rewards) > 1 else 0.0,
        "frac_reward_zero_std": fmean(map(has_equal_rewards, groups)),
    }
