"""Direct preference optimization (Rafailov et al. 2023): a model learns which of two responses people prefer.

The reference is the model that training starts with. Its log-probabilities of all pairs are computed once, before the
first update, by the policy, which is still the same model then. They are kept in the checkpoints, so that no second
model takes up memory.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from cs336_alignment.datasets.overlap import find_overlap
from cs336_alignment.datasets.preferences import PreferencePair, load_preferences
from cs336_alignment.policy.optimizer import split_into_microbatches
from cs336_alignment.policy.policy import Policy, TokenizedExample
from cs336_alignment.programs.configs.dpo import DpoConfig
from cs336_alignment.prompts.templates import load_prompt
from cs336_alignment.runs.data_order import Epochs, shuffled_indices
from cs336_alignment.runs.training_run import TrainingRun, open_run
from cs336_alignment.tensors.dpo_loss import dpo_loss, encode_document
from cs336_alignment.tensors.masked import masked_normalize

TEMPLATE = "alpaca_sft"


def train_dpo(config: DpoConfig) -> dict[str, float]:
    """Train a model on preferences, or resume doing so, and return its last metrics.

    `train/*` and `eval/*` are means over the pairs of a batch and over the held-out pairs: `loss`; `chosen_reward` and
    `rejected_reward`, the implicit rewards of the responses; `margin`, their difference; and `accuracy`, the fraction
    of pairs with a positive margin. Before the first update, policy and reference are the same: all rewards are 0, and
    the accuracy is 0 too.

    Raises:
        ValueError, FileNotFoundError: the data, the model, a checkpoint or the configuration is not usable.
        FloatingPointError: training has diverged; the message names the file with the batch.
        OSError: a checkpoint cannot be written.
    """
    pairs, left_out = load_pairs(config)
    train_pairs, held_out_pairs, overlapping = hold_out(pairs, config)
    if overlapping:
        left_out["the prompt of a held-out pair"] = overlapping
    with open_run(config) as run:
        train = tokenize_pairs(config, run, train_pairs, left_out)
        held_out = tokenize_pairs(config, run, held_out_pairs, left_out)
        announce_pairs(run, train, held_out, left_out)
        train_reference = reference_log_probs(config, run, "train_reference", train)
        held_out_reference = reference_log_probs(config, run, "held_out_reference", held_out)
        epochs = Epochs(len(train), config.batch_size, config.epochs, config.seed)
        run.log.expect(epochs.updates)
        if run.start == 0 and held_out:
            evaluate_pairs(config, run, held_out, held_out_reference, 0)
        for update in run.steps(epochs.updates):
            indices = epochs.batch(update)
            batch, reference = [train[index] for index in indices], train_reference[:, indices]
            lr = config.optimizer.lr_at(update, epochs.updates)
            run.log.write("train", update, dpo_update(config, run, batch, reference, update, lr))
            run.progress["update"] = update
            if held_out and (update % config.eval_every == 0 or update == epochs.updates):
                evaluate_pairs(config, run, held_out, held_out_reference, update)
        return run.log.latest


@dataclass(frozen=True)
class TokenizedPair:
    """The two responses to a prompt, in token ids. Both examples have the same prompt."""

    chosen: TokenizedExample
    rejected: TokenizedExample

    def __len__(self) -> int:
        """Tokens that the pair takes up in a batch, padding included."""
        return 2 * max(len(self.chosen), len(self.rejected))

    def as_json(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """Return the pair as text, in plain data for JSON."""
        chosen, rejected = (each.as_json(tokenizer) for each in (self.chosen, self.rejected))
        return {"prompt": chosen["prompt"], "chosen": chosen["response"], "rejected": rejected["response"]}


def dpo_update(
    config: DpoConfig,
    run: TrainingRun,
    batch: Sequence[TokenizedPair],
    reference: Float[Tensor, "2 pairs"],
    update: int,
    lr: float,
) -> dict[str, float]:
    """Update the policy once, and return metrics."""
    with run.optimizer_step(update, lr, batch) as gradients:
        for indices in microbatches_of(config, batch):
            part = [batch[index] for index in indices]
            shares = loss_and_metrics(config, run.policy, part, reference[:, indices], len(batch))
            gradients.backward(shares.pop("loss"), **shares)
    seconds = run.log.pop_phase_seconds()
    tokens = sum(len(pair.chosen) + len(pair.rejected) for pair in batch)
    return {**gradients.metrics, **seconds, "tokens_per_second": tokens / seconds["seconds/update"]}


def evaluate_pairs(
    config: DpoConfig,
    run: TrainingRun,
    pairs: Sequence[TokenizedPair],
    reference: Float[Tensor, "2 pairs"],
    update: int,
) -> None:
    """Compute the metrics of the held-out pairs, and log them."""
    model = run.policy.model.eval()
    metrics: defaultdict[str, float] = defaultdict(float)
    with run.log.phase("evaluation"), torch.no_grad():
        for indices in microbatches_of(config, pairs):
            part = [pairs[index] for index in indices]
            shares = loss_and_metrics(config, run.policy, part, reference[:, indices], len(pairs))
            for name, share in shares.items():
                metrics[name] += share.item()
    model.train()
    run.log.write("eval", update, metrics | run.log.pop_phase_seconds())


def loss_and_metrics(
    config: DpoConfig,
    policy: Policy,
    pairs: Sequence[TokenizedPair],
    reference: Float[Tensor, "2 pairs"],
    total: int,
) -> dict[str, Float[Tensor, ""]]:
    """Compute the loss and the metrics of pairs, as their share of a mean over `total` pairs."""
    policy_chosen, policy_rejected = pair_log_probs(policy, pairs)
    ref_chosen, ref_rejected = reference
    losses, chosen, rejected = dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, config.beta)
    values = {
        "loss": losses,
        "accuracy": (chosen > rejected).float(),
        "margin": chosen - rejected,
        "chosen_reward": chosen,
        "rejected_reward": rejected,
    }
    return {name: value.sum() / total for name, value in values.items()}


def pair_log_probs(policy: Policy, pairs: Sequence[TokenizedPair]) -> Float[Tensor, "2 pairs"]:
    """Compute log-probabilities of whole responses, given their prompts: of the chosen ones, then of the others."""
    result = policy.response_log_probs([*(pair.chosen for pair in pairs), *(pair.rejected for pair in pairs)])
    return masked_normalize(result.log_probs, result.mask, dim=-1).view(2, -1)


def reference_log_probs(
    config: DpoConfig, run: TrainingRun, name: str, pairs: Sequence[TokenizedPair]
) -> Float[Tensor, "2 pairs"]:
    """Return the reference's log-probabilities: from the checkpoint, or from the policy before its first update.

    Args:
        name: the name under which checkpoints keep them.

    Raises:
        ValueError: the checkpoint has those of another number of pairs.
    """
    if name not in run.progress:
        log_probs = torch.zeros(2, len(pairs))
        model = run.policy.model.eval()
        with run.log.phase("reference_log_probs"), torch.no_grad():
            for indices in microbatches_of(config, pairs):
                log_probs[:, indices] = pair_log_probs(run.policy, [pairs[index] for index in indices]).cpu()
        model.train()
        run.progress[name] = log_probs.tolist()
    log_probs = torch.tensor(run.progress[name], device=run.policy.device)
    if log_probs.shape[1] != len(pairs):
        raise ValueError(
            f"{config.run_dir} began with {log_probs.shape[1]} pairs instead of these {len(pairs)}; "
            "restore the files of train_data, or choose another folder with --run"
        )
    return log_probs


def microbatches_of(config: DpoConfig, pairs: Sequence[TokenizedPair]) -> list[list[int]]:
    """Split pairs into microbatches of indices."""
    return split_into_microbatches([len(pair) for pair in pairs], config.optimizer, config.batch_size)


def load_pairs(config: DpoConfig) -> tuple[list[PreferencePair], Counter[str]]:
    """Read the pairs of all files, and count those that were left out, by reason."""
    pairs: list[PreferencePair] = []
    left_out: Counter[str] = Counter()
    for path in config.train_data:
        more, reasons = load_preferences(path)
        pairs += more
        left_out += reasons
    return pairs, left_out


def hold_out(
    pairs: Sequence[PreferencePair], config: DpoConfig
) -> tuple[list[PreferencePair], list[PreferencePair], int]:
    """Split pairs into those to train on and those held out.

    Returns:
        The two lists, and the number of pairs in neither, because they share their prompt with a held-out pair.
    """
    if config.held_out_pairs >= len(pairs):
        raise ValueError(
            f"held_out_pairs is {config.held_out_pairs}, but there are {len(pairs)} pairs in all; hold out fewer"
        )
    order = shuffled_indices(len(pairs), seed=0, start=0, count=len(pairs))
    shuffled = [pairs[index] for index in order]
    held_out, train = shuffled[: config.held_out_pairs], shuffled[config.held_out_pairs :]
    overlapping = set() if config.allow_overlap else set(find_overlap(train, held_out))
    return [pair for index, pair in enumerate(train) if index not in overlapping], held_out, len(overlapping)


def tokenize_pairs(
    config: DpoConfig, run: TrainingRun, pairs: Sequence[PreferencePair], left_out: Counter[str]
) -> list[TokenizedPair]:
    """Tokenize pairs. Those that are too long are left out and counted: cut short, a response would lack its end."""
    policy = run.policy
    limit = min(config.max_tokens or policy.context_length, policy.context_length)
    tokenized = [tokenize_pair(policy.tokenizer, pair) for pair in pairs]
    fitting = [pair for pair in tokenized if max(len(pair.chosen), len(pair.rejected)) <= limit]
    if len(fitting) < len(pairs):
        left_out[f"more than {limit} tokens"] += len(pairs) - len(fitting)
    return fitting


def tokenize_pair(tokenizer: PreTrainedTokenizerBase, pair: PreferencePair) -> TokenizedPair:
    """Tokenize a pair in the Alpaca template, with an end of sequence after each response.

    Each document is tokenized as a whole. A token that spans the boundary between prompt and response, which some
    tokenizers make of the line break there, belongs to the response.

    Raises:
        ValueError: the tokenizer has no end-of-sequence token.
    """
    prompt = tokenizer(load_prompt(TEMPLATE).render(instruction=pair.prompt))["input_ids"]
    chosen, rejected = (
        encode_document(tokenizer, pair.prompt, response, TEMPLATE) for response in (pair.chosen, pair.rejected)
    )
    shared = 0
    while shared < len(prompt) and prompt[shared] == chosen[shared] == rejected[shared]:
        shared += 1
    return TokenizedPair(*(TokenizedExample(tuple(ids[:shared]), tuple(ids[shared:])) for ids in (chosen, rejected)))


def announce_pairs(
    run: TrainingRun, train: Sequence[TokenizedPair], held_out: Sequence[TokenizedPair], left_out: Counter[str]
) -> None:
    """Print how many pairs there are, and raise a ValueError if there is none to train on."""
    reasons = ", ".join(f"{count} for {reason}" for reason, count in left_out.items())
    counts = f"{len(train)} pairs to train on, {len(held_out)} held out"
    run.log.console.print(counts + (f"; left out: {reasons}" if reasons else ""), highlight=False, soft_wrap=True)
    if not train:
        raise ValueError(f"no pair is left to train on (left out: {reasons})")
