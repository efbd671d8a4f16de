"""Group relative policy optimisation (Shao et al. 2024) and its kin: rollouts, rewards, advantages, updates."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from cs336_alignment.advantages import group_advantages
from cs336_alignment.data_order import seed_of_draw, shuffled_indices
from cs336_alignment.datasets import check_no_overlap, load_examples
from cs336_alignment.evaluator import EvaluationConfig, Evaluator, open_rollouts_of
from cs336_alignment.example import Example
from cs336_alignment.generation_log import Generation, summarize
from cs336_alignment.losses import RECIPES, Aggregation, LossType, Recipe
from cs336_alignment.masked import masked_normalize
from cs336_alignment.microbatch import grpo_microbatch_train_step
from cs336_alignment.policy import Policy, TokenRow, on_mask
from cs336_alignment.pretrained import load_policy
from cs336_alignment.rollouts import POLICY_BYTES, RolloutConfig, Rollouts
from cs336_alignment.training_run import TrainingConfig, TrainingRun, check_at_least_one, open_run

#: Of a parameter of the model that the divergence is measured from, which is kept in float32.
REFERENCE_BYTES = 4


@dataclass(frozen=True)
class GrpoConfig(TrainingConfig):
    """Everything that a run of GRPO depends on."""

    run: Path = Path("runs/grpo")
    """Folder of the run; an existing one is resumed."""
    train_data: Path = Path("data/math/train.jsonl")
    """Questions with answers."""
    n_grpo_steps: int = 200
    """Steps, each of a batch of rollouts and of the updates that are made with it."""
    rollout_batch_size: int = 256
    """Responses of a step."""
    group_size: int = 8
    """Responses to the same question, which are compared with each other."""
    min_tokens: int = 4
    """The fewest tokens of a response."""
    epochs_per_rollout_batch: int = 1
    """How often each response is trained on. With more than one, later updates are off-policy."""
    train_batch_size: int = 256
    """Responses of an update. With fewer than in the rollout batch, later updates are off-policy."""
    loss_type: LossType = "reinforce_with_baseline"
    """The loss, and with it what else goes by its name: see `losses.RECIPES`."""
    use_std_normalization: bool = True
    """Divide advantages by the standard deviation of their group; dr_grpo never does."""
    advantage_eps: float = 1e-6
    """Added to the standard deviation."""
    cliprange: float = 0.2
    """How far the ratio of new to old probabilities may move from 1 in losses that clip."""
    cliprange_high: float | None = None
    """How far it may rise, if that is another number. Default: the loss type's."""
    length_normalization: Aggregation | None = None
    """How the tokens of a batch become one number, see `losses.aggregate`. Default: the loss type's."""
    normalize_constant: float | None = None
    """What masked_normalize divides the sum of a response's tokens by. Default: max_tokens."""
    kl_coefficient: float = 0.0
    """Cost of a nat of divergence from the model that training began with, by token."""
    max_rollout_rounds: int = 4
    """dapo: how often questions are drawn in a step until enough groups have more than one reward."""
    checkpoint_every: int = 20
    """Steps between checkpoints; the last step always gets one."""
    rollouts: RolloutConfig = field(default_factory=RolloutConfig)
    """How responses come about, and what they are worth."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """The evaluations."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_one(
            self,
            *("n_grpo_steps", "rollout_batch_size", "group_size", "epochs_per_rollout_batch", "train_batch_size"),
            "max_rollout_rounds",
        )
        self.optimizer.check_batch_size("train_batch_size", self.train_batch_size)
        if self.rollout_batch_size % self.group_size:
            raise ValueError(
                f"rollout_batch_size {self.rollout_batch_size} must be a multiple of group_size {self.group_size}: "
                "it is made of whole groups"
            )
        if self.train_batch_size < self.group_size:
            raise ValueError(
                f"train_batch_size {self.train_batch_size} must be at least group_size {self.group_size}: "
                "an update needs a group"
            )
        if self.rollout_batch_size % self.train_batch_size:
            raise ValueError(
                f"rollout_batch_size {self.rollout_batch_size} must be a multiple of train_batch_size "
                f"{self.train_batch_size}: an epoch is made of whole updates"
            )
        if self.group_size == 1 and self.recipe.weight == "advantages":
            raise ValueError(
                f"group_size is 1, but loss_type {self.loss_type!r} compares the responses of a group; "
                "take at least 2, or loss_type no_baseline"
            )
        if self.rollouts.reward is None:
            raise ValueError("GRPO needs a reward function, but reward is None")
        if self.rollouts.temperature == 0:
            raise ValueError("temperature is 0, but all responses of a group are the same then; choose one above 0")
        for name in ("advantage_eps", "cliprange", "cliprange_high", "kl_coefficient"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, but must not be negative")
        if self.normalize_constant is not None and not self.normalize_constant > 0:
            raise ValueError(f"normalize_constant is {self.normalize_constant}, but must be positive")
        self.rollouts.sampling(min_tokens=self.min_tokens)

    @property
    def recipe(self) -> Recipe:
        """What the loss type stands for, with what this configuration overrules."""
        named = RECIPES[self.loss_type]
        return replace(
            named,
            normalize_by_std=named.normalize_by_std and self.use_std_normalization,
            aggregation=self.length_normalization or named.aggregation,
            cliprange_high=named.cliprange_high if self.cliprange_high is None else self.cliprange_high,
        )

    @property
    def updates_per_epoch(self) -> int:
        return self.rollout_batch_size // self.train_batch_size

    @property
    def updates_per_step(self) -> int:
        return self.epochs_per_rollout_batch * self.updates_per_epoch

    @property
    def off_policy(self) -> bool:
        """Whether some updates are made with responses of an older policy."""
        return self.updates_per_step > 1


def train_grpo(config: GrpoConfig) -> dict[str, float]:
    """Train a model by its rewards, or go on with it, and return its last metrics.

    Raises:
        ValueError, FileNotFoundError: the data, the model, a checkpoint or the configuration does not fit.
        FloatingPointError: training has diverged; the message names the file with the batch.
        OSError: a checkpoint cannot be written.
    """
    examples = load_examples(config.train_data)
    questions = load_examples(config.evaluation.eval_data) if config.evaluation.eval_data else []
    check_no_overlap(examples, questions, config.allow_overlap)
    memory = POLICY_BYTES + (REFERENCE_BYTES if config.kl_coefficient else 0)
    with open_run(config) as run, open_rollouts_of(run, config.rollouts, memory) as rollouts:
        evaluator = Evaluator(run, rollouts, questions, config.evaluation, config.rollouts)
        trainer = _Trainer(config, run, rollouts, examples)
        run.log.expect(config.n_grpo_steps * config.updates_per_step)
        if run.start == 0:
            evaluator.evaluate_if_due(0, config.n_grpo_steps, update=0)
        for step in run.steps(config.n_grpo_steps):
            trainer.step(step)
            evaluator.evaluate_if_due(step, config.n_grpo_steps, run.progress["update"])
            run.log.show_line()
        return run.log.latest


@dataclass(frozen=True)
class _Experience:
    """Responses to learn from, and what is known of each."""

    generations: list[Generation]
    rows: list[TokenRow]
    raw_rewards: Float[Tensor, " n"]
    advantages: Float[Tensor, " n"]
    old_log_probs: list[Tensor] | None
    """Of each row's response, from before the first update; None if there is only one update."""
    reference_log_probs: list[Tensor] | None
    """Of the model that training began with; None if the loss does not depend on it."""

    def as_json(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Some of the responses as plain data."""
        return [
            {
                **self.generations[index].as_json(),
                "advantage": self.advantages[index].item(),
                "token_ids": self.rows[index].response,
            }
            for index in indices
        ]


class _Trainer:
    """What the steps of a run share."""

    def __init__(self, config: GrpoConfig, run: TrainingRun, rollouts: Rollouts, examples: Sequence[Example]) -> None:
        self.config = config
        self.recipe = config.recipe
        self.run = run
        self.policy = run.policy
        self.rollouts = rollouts
        self.examples = examples
        self.params = config.rollouts.sampling(n=config.group_size, min_tokens=config.min_tokens)
        self.reference: Policy | None = None
        if config.kl_coefficient:
            self.reference = replace(self.policy, model=load_policy(config.model, self.policy.device))

    def step(self, step: int) -> None:
        """Sample and grade responses, then update the policy with them."""
        log, update = self.run.log, (step - 1) * self.config.updates_per_step
        groups, kept = self._roll_out(update)
        experience = self._experience([generation for group in kept for generation in group])
        outcome = {"grpo_step": step, **_summarize_groups(groups)}
        for indices in self._batches(len(experience.rows), step):
            update += 1
            metrics = self._update(experience, indices, update)
            seconds = log.take_seconds()
            if "seconds/rollout" in seconds:  # before the first update of the step
                tokens = sum(len(each.completion.token_ids) for group in groups for each in group)
                metrics["rollout_tokens_per_second"] = tokens / seconds["seconds/rollout"]
            if "seconds/update" in seconds:
                tokens = sum(len(experience.rows[index]) for index in indices)
                metrics["tokens_per_second"] = tokens / seconds["seconds/update"]
            log.write("train", update, {**metrics, **outcome, **seconds})
        self.run.progress["update"] = step * self.config.updates_per_step

    def _roll_out(self, update: int) -> tuple[list[list[Generation]], list[list[Generation]]]:
        """Groups of responses: all that were sampled, and those to learn from.

        Where groups with one reward are skipped, other questions are drawn in their place ("dynamic sampling", Yu et
        al. 2025, section 3.2), but not more often than `max_rollout_rounds`.
        """
        config, size = self.config, self.config.group_size
        wanted = config.rollout_batch_size // size
        groups: list[list[Generation]] = []
        kept: list[list[Generation]] = []
        self.rollouts.load(self.policy, update)
        for _ in range(config.max_rollout_rounds if self.recipe.skip_equal_groups else 1):
            missing, drawn = wanted - len(kept), self.run.progress.get("questions_drawn", 0)
            indices = shuffled_indices(len(self.examples), config.seed, drawn, missing)
            self.run.progress["questions_drawn"] = drawn + missing
            params = replace(self.params, seed=seed_of_draw(config.seed, drawn))
            flat = self.rollouts.respond([self.examples[index] for index in indices], params)
            new = [flat[start : start + size] for start in range(0, len(flat), size)]
            groups += new
            kept += [group for group in new if not (self.recipe.skip_equal_groups and _has_one_reward(group))]
            if len(kept) == wanted:
                break
        self.rollouts.rest()
        return groups, kept

    def _experience(self, generations: list[Generation]) -> _Experience:
        config, policy = self.config, self.policy
        rows = [generation.row(policy) for generation in generations]
        raw_rewards = torch.tensor([generation.rewards["reward"] for generation in generations], dtype=torch.float32)
        advantages = torch.zeros(0)
        if rows:
            normalize_by_std = self.recipe.normalize_by_std and config.group_size > 1
            advantages, _ = group_advantages(raw_rewards, config.group_size, config.advantage_eps, normalize_by_std)

        microbatches = config.optimizer.microbatches([len(row) for row in rows], config.train_batch_size)
        old = reference = None
        if config.off_policy:
            with self.run.log.phase("old_log_probs"):
                old = policy.frozen_log_probs(rows, microbatches, config.rollouts.temperature)
        if self.reference:
            with self.run.log.phase("reference_log_probs"):
                reference = self.reference.frozen_log_probs(rows, microbatches, config.rollouts.temperature)
        return _Experience(
            generations, rows, raw_rewards.to(policy.device), advantages.to(policy.device), old, reference
        )

    def _batches(self, count: int, step: int) -> Iterator[list[int]]:
        """The responses of each update: all of them once an epoch, in another order each time."""
        for epoch in range(self.config.epochs_per_rollout_batch):
            order = np.random.default_rng((self.config.seed, step, epoch)).permutation(count).tolist()
            for start in range(0, max(1, count), self.config.train_batch_size):
                yield order[start : start + self.config.train_batch_size]

    def _update(self, experience: _Experience, batch: list[int], update: int) -> dict[str, float]:
        """Update the policy once; returns metrics.

        There is no update if the responses teach nothing, because none of them is better than the others. AdamW would
        move the weights all the same, by its momentum.
        """
        config, rows = self.config, experience.rows
        weights = experience.raw_rewards if self.recipe.weight == "raw_rewards" else experience.advantages
        tokens = sum(len(rows[index].response) for index in batch)
        if tokens == 0 or not (weights[batch].any() or self.reference):
            return {"skipped": 1}
        gaps: list[Tensor] = []

        def train_step(places: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
            loss, logged, gap = self._train_step(experience, [batch[place] for place in places], tokens, len(batch))
            gaps.append(gap)
            return loss, logged

        microbatches = config.optimizer.microbatches([len(rows[index]) for index in batch], config.train_batch_size)
        lr = config.optimizer.lr_at(update, config.n_grpo_steps * config.updates_per_step)
        metrics = self.run.update(update, microbatches, train_step, lr, lambda: experience.as_json(batch))
        if config.rollouts.temperature == 1:  # the engine's log-probabilities are before temperature
            gap = torch.cat(gaps)
            metrics |= {"log_prob_gap": gap.mean().item(), "log_prob_gap_max": gap.max().item()}
        return {"skipped": 0, **metrics}

    def _train_step(
        self, experience: _Experience, indices: list[int], total_tokens: int, total_sequences: int
    ) -> tuple[Tensor, dict[str, Tensor], Float[Tensor, " tokens"]]:
        """Back-propagate the loss of a microbatch.

        Args:
            total_tokens, total_sequences: responses' tokens, and responses, of the whole batch.

        Returns:
            The microbatch's share of the loss, its shares of means over all tokens, and how far the engine's
            log-probability of each token is from the trainer's of before the first update.
        """
        config = self.config
        now = self.policy.response_log_probs(
            [experience.rows[index] for index in indices], config.rollouts.temperature, return_token_entropy=True
        )
        engine = [torch.tensor(experience.generations[index].completion.log_probs) for index in indices]
        old = now.log_probs.detach()
        if experience.old_log_probs is not None:
            old = on_mask([experience.old_log_probs[index] for index in indices], now.mask)
        reference = None
        if experience.reference_log_probs is not None:
            reference = on_mask([experience.reference_log_probs[index] for index in indices], now.mask)
        loss, metadata = grpo_microbatch_train_step(
            now.log_probs,
            now.mask,
            1,
            config.loss_type,
            experience.raw_rewards[indices].unsqueeze(1),
            experience.advantages[indices].unsqueeze(1),
            old,
            config.cliprange,
            cliprange_high=self.recipe.cliprange_high,
            reference_log_probs=reference,
            kl_coefficient=config.kl_coefficient,
            aggregation=self.recipe.aggregation,
            normalize_constant=config.normalize_constant or config.rollouts.max_tokens,
            total_tokens=total_tokens,
            total_sequences=total_sequences,
        )
        logged = {
            "token_entropy": now.token_entropy,
            "clip_fraction": metadata.get("clipped"),
            "kl": metadata.get("kl"),
        }
        shares = {
            name: masked_normalize(values.float(), now.mask, normalize_constant=total_tokens)
            for name, values in logged.items()
            if values is not None
        }
        return loss, shares, (old - on_mask(engine, now.mask))[now.mask].abs()


def _has_one_reward(group: Sequence[Generation]) -> bool:
    return len({generation.rewards["reward"] for generation in group}) == 1


def _summarize_groups(groups: Sequence[Sequence[Generation]]) -> dict[str, float]:
    """`summarize`, `reward_std` over all responses, and `zero_std_groups`, the share of groups with one reward."""
    generations = [generation for group in groups for generation in group]
    rewards = [generation.rewards["reward"] for generation in generations]
    return {
        **summarize(generations),
        "reward_std": stdev(rewards) if len(rewards) > 1 else 0.0,
        "zero_std_groups": fmean(map(_has_one_reward, groups)),
    }
