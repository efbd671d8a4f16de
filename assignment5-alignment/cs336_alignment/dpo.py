"""Direct preference optimisation (Rafailov et al. 2023): a model learns which of two responses people prefer.

The reference is the model that training begins with. Its log-probabilities of all pairs are computed once, before the
first update, by the policy that it still is then, and stay with the checkpoints: no second model takes memory.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from cs336_alignment.data_order import Epochs, shuffled_indices
from cs336_alignment.datasets import PreferencePair, find_overlap, load_preferences
from cs336_alignment.datasets.preferences import HH_SUBSETS
from cs336_alignment.dpo_loss import dpo_loss, encode_document
from cs336_alignment.masked import masked_normalize
from cs336_alignment.policy import Policy, TokenRow
from cs336_alignment.policy_optimizer import OptimizerConfig
from cs336_alignment.prompts import load_prompt
from cs336_alignment.training_run import TrainingConfig, TrainingRun, check_at_least_one, open_run

TEMPLATE = "alpaca_sft"


@dataclass(frozen=True)
class DpoConfig(TrainingConfig):
    """Everything that a run of DPO depends on."""

    run: Path = Path("runs/dpo")
    """Folder of the run; an existing one is resumed."""
    train_data: tuple[Path, ...] = tuple(Path(f"data/hh/{subset}/train.jsonl.gz") for subset in HH_SUBSETS)
    """Files of preference pairs, as JSON lines. Dialogues of more than one turn are left out."""
    held_out_pairs: int = 200
    """Pairs that are evaluated on and not trained on, drawn at random but always the same; 0 for no evaluation."""
    allow_overlap: bool = False
    """Train also on pairs whose prompt is that of a held-out pair; by default they are left out."""
    eval_every: int = 50
    """Updates between evaluations. There is also one before the first update and one after the last."""
    epochs: int = 1
    """How often each pair is seen."""
    batch_size: int = 64
    """Pairs of an update."""
    beta: float = 0.1
    """How strongly the policy is held to the reference: rewards are the log-ratio of their probabilities times it."""
    max_tokens: int | None = None
    """Leave out pairs of which a response, with its prompt, has more tokens. Default: the model's context."""
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-6, algorithm="rmsprop", microbatch_tokens=8192)
    """How the policy is updated; a pair counts as both of its responses, with their prompt."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_one(self, "eval_every", "epochs", "batch_size", "max_tokens")
        if not self.train_data:
            raise ValueError("train_data is empty; name at least one file of preference pairs")
        if self.held_out_pairs < 0:
            raise ValueError(f"held_out_pairs is {self.held_out_pairs}, but must not be negative")
        if self.beta <= 0:
            raise ValueError(f"beta is {self.beta}, but must be positive")
        self.optimizer.check_batch_size("batch_size", self.batch_size)


def train_dpo(config: DpoConfig) -> dict[str, float]:
    """Train a model on preferences, or go on with it, and return its last metrics.

    `train/*` and `eval/*` are means over the pairs of a batch and over those held out: `loss`; `chosen_reward` and
    `rejected_reward`, the implicit rewards of the responses; `margin`, their difference; and `accuracy`, the share of
    pairs with a positive one. At the start, where policy and reference are one, all rewards are 0 and accuracy is too.

    Raises:
        ValueError, FileNotFoundError: the data, the model, a checkpoint or the configuration does not fit.
        FloatingPointError: training has diverged; the message names the file with the batch.
        OSError: a checkpoint cannot be written.
    """
    pairs, left_out = _load(config.train_data)
    train, held_out, overlapping = _hold_out(pairs, config)
    if overlapping:
        left_out["the prompt of a held-out pair"] = overlapping
    with open_run(config) as run:
        trainer = _Trainer(config, run, train, held_out, left_out)
        total = trainer.epochs.updates
        run.log.expect(total)
        if run.start == 0:
            trainer.evaluate_if_due(0)
        for step in run.steps(total):
            trainer.update(step)
            trainer.evaluate_if_due(step)
            run.log.show_line()
        return run.log.latest


@dataclass(frozen=True)
class TokenPair:
    """The two responses to a prompt, in token ids; the prompts of the two rows are the same."""

    chosen: TokenRow
    rejected: TokenRow

    def __len__(self) -> int:
        """Tokens that the pair takes in a batch, with their padding."""
        return 2 * max(len(self.chosen), len(self.rejected))


def tokenize_pair(tokenizer: PreTrainedTokenizerBase, pair: PreferencePair) -> TokenPair:
    """A pair in the Alpaca template, each response with an end of sequence.

    The documents are tokenised as a whole. A token that spans the boundary between prompt and response, which other
    tokenizers may make of a line break there, belongs to the response.

    Raises:
        ValueError: the tokenizer has no end of sequence.
    """
    prompt = tokenizer(load_prompt(TEMPLATE).render(instruction=pair.prompt))["input_ids"]
    chosen, rejected = (
        encode_document(tokenizer, pair.prompt, response, TEMPLATE) for response in (pair.chosen, pair.rejected)
    )
    shared = 0
    while shared < len(prompt) and prompt[shared] == chosen[shared] == rejected[shared]:
        shared += 1
    return TokenPair(*(TokenRow(tuple(ids[:shared]), tuple(ids[shared:])) for ids in (chosen, rejected)))


def pair_log_probs(policy: Policy, pairs: Sequence[TokenPair]) -> Float[Tensor, "2 pairs"]:
    """Log-probabilities of the whole responses, given their prompts: of the chosen, then of the rejected ones."""
    result = policy.response_log_probs([*(pair.chosen for pair in pairs), *(pair.rejected for pair in pairs)])
    return masked_normalize(result.log_probs, result.mask, dim=-1).view(2, -1)


class _Trainer:
    """What the updates and the evaluations of a run share."""

    def __init__(
        self,
        config: DpoConfig,
        run: TrainingRun,
        train: Sequence[PreferencePair],
        held_out: Sequence[PreferencePair],
        left_out: Counter[str],
    ) -> None:
        self.config = config
        self.run = run
        self.train = self._tokenize(train, left_out)
        self.held_out = self._tokenize(held_out, left_out)
        reasons = ", ".join(f"{count} for {reason}" for reason, count in left_out.items())
        self._say(
            f"{len(self.train)} pairs to train on, {len(self.held_out)} held out"
            + (f"; left out: {reasons}" if reasons else "")
        )
        if not self.train:
            raise ValueError(f"no pair is left to train on (left out: {reasons})")
        self.epochs = Epochs(len(self.train), config.batch_size, config.epochs, config.seed)
        self.train_reference = self._reference("train_reference", self.train)
        self.held_out_reference = self._reference("held_out_reference", self.held_out)

    def update(self, step: int) -> None:
        """Update the policy once, and log it."""
        run, batch = self.run, self.epochs.batch(step)

        def train_step(places: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
            indices = [batch[place] for place in places]
            shares = self._shares(self.train, self.train_reference, indices, len(batch))
            loss = shares.pop("loss")
            loss.backward()
            return loss.detach(), shares

        def as_json() -> list[dict[str, Any]]:
            decode = run.policy.tokenizer.decode
            return [
                {
                    "prompt": decode(list(pair.chosen.prompt)),
                    "chosen": decode(list(pair.chosen.response)),
                    "rejected": decode(list(pair.rejected.response)),
                }
                for pair in (self.train[index] for index in batch)
            ]

        microbatches = self._microbatches([self.train[index] for index in batch])
        lr = self.config.optimizer.lr_at(step, self.epochs.updates)
        metrics = run.update(step, microbatches, train_step, lr, as_json)
        run.progress["update"] = step
        seconds = run.log.take_seconds()
        tokens = sum(len(row) for index in batch for row in (self.train[index].chosen, self.train[index].rejected))
        rate = {"tokens_per_second": tokens / seconds["seconds/update"]}
        run.log.write("train", step, metrics | seconds | rate)

    def evaluate_if_due(self, step: int) -> None:
        """Compare the held-out pairs, and log it, if it is this update's turn."""
        if not self.held_out or (step % self.config.eval_every and step != self.epochs.updates):
            return
        model = self.run.policy.model.eval()
        metrics: defaultdict[str, float] = defaultdict(float)
        with self.run.log.phase("evaluation"), torch.no_grad():
            for indices in self._microbatches(self.held_out):
                shares = self._shares(self.held_out, self.held_out_reference, indices, len(self.held_out))
                for name, share in shares.items():
                    metrics[name] += share.item()
        model.train()
        self.run.log.write("eval", step, metrics | self.run.log.take_seconds())

    def _shares(
        self, pairs: Sequence[TokenPair], reference: Float[Tensor, "2 pairs"], indices: Sequence[int], total: int
    ) -> dict[str, Float[Tensor, ""]]:
        """The loss and other metrics of some pairs, as their share of a mean over `total` pairs."""
        policy_chosen, policy_rejected = pair_log_probs(self.run.policy, [pairs[index] for index in indices])
        ref_chosen, ref_rejected = reference[:, indices]
        losses, chosen, rejected = dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, self.config.beta)
        values = {
            "loss": losses,
            "accuracy": (chosen > rejected).float(),
            "margin": chosen - rejected,
            "chosen_reward": chosen,
            "rejected_reward": rejected,
        }
        return {name: value.sum() / total for name, value in values.items()}

    def _reference(self, name: str, pairs: Sequence[TokenPair]) -> Float[Tensor, "2 pairs"]:
        """The log-probabilities of the reference: from the checkpoint, or from the policy before its first update."""
        run = self.run
        if name not in run.progress:
            log_probs = torch.zeros(2, len(pairs))
            model = run.policy.model.eval()
            with run.log.phase("reference_log_probs"), torch.no_grad():
                for indices in self._microbatches(pairs):
                    log_probs[:, indices] = pair_log_probs(run.policy, [pairs[index] for index in indices]).cpu()
            model.train()
            run.progress[name] = log_probs.tolist()
        log_probs = torch.tensor(run.progress[name], device=run.policy.device)
        if log_probs.shape[1] != len(pairs):
            raise ValueError(
                f"{self.config.run} began with {log_probs.shape[1]} pairs in place of these {len(pairs)}; "
                "restore the files of train_data, or choose another folder with --run"
            )
        return log_probs

    def _tokenize(self, pairs: Sequence[PreferencePair], left_out: Counter[str]) -> list[TokenPair]:
        """The pairs in tokens. Those that are too long are left out: cut short, a response would lack its end."""
        policy = self.run.policy
        limit = min(self.config.max_tokens or policy.context_length, policy.context_length)
        tokenized = [tokenize_pair(policy.tokenizer, pair) for pair in pairs]
        fitting = [pair for pair in tokenized if max(len(pair.chosen), len(pair.rejected)) <= limit]
        if len(fitting) < len(pairs):
            left_out[f"more than {limit} tokens"] += len(pairs) - len(fitting)
        return fitting

    def _microbatches(self, pairs: Sequence[TokenPair]) -> list[list[int]]:
        return self.config.optimizer.microbatches([len(pair) for pair in pairs], self.config.batch_size)

    def _say(self, text: str) -> None:
        self.run.log.console.print(text, highlight=False, soft_wrap=True)


def _load(paths: Sequence[Path]) -> tuple[list[PreferencePair], Counter[str]]:
    """The pairs of all files, and how many were left out, by the reason."""
    pairs: list[PreferencePair] = []
    left_out: Counter[str] = Counter()
    for path in paths:
        more, reasons = load_preferences(path)
        pairs += more
        left_out += reasons
    return pairs, left_out


def _hold_out(
    pairs: Sequence[PreferencePair], config: DpoConfig
) -> tuple[list[PreferencePair], list[PreferencePair], int]:
    """Pairs to train on, those held out, and how many are neither because they share their prompt with the latter."""
    if config.held_out_pairs >= len(pairs):
        raise ValueError(
            f"held_out_pairs is {config.held_out_pairs}, but there are {len(pairs)} pairs in all; hold out fewer"
        )
    order = shuffled_indices(len(pairs), seed=0, start=0, count=len(pairs))
    shuffled = [pairs[index] for index in order]
    held_out, train = shuffled[: config.held_out_pairs], shuffled[config.held_out_pairs :]
    overlapping = set() if config.allow_overlap else set(find_overlap(train, held_out))
    return [pair for index, pair in enumerate(train) if index not in overlapping], held_out, len(overlapping)
