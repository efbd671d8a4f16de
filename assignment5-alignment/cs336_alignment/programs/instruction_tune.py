"""Instruction tuning (Ouyang et al. 2022): next-token prediction on packed documents of prompts with responses."""

from pathlib import Path

import torch

from cs336_alignment.datasets.demonstrations import load_demonstrations
from cs336_alignment.datasets.overlap import check_no_overlap
from cs336_alignment.datasets.packing import PackedSftDataset
from cs336_alignment.policy.optimizer import split_into_microbatches
from cs336_alignment.policy.policy import Policy, TokenizedExample
from cs336_alignment.programs.configs.instruction_tune import InstructionTuneConfig
from cs336_alignment.programs.sft import sft_update
from cs336_alignment.runs.data_order import Epochs
from cs336_alignment.runs.training_run import TrainingRun, open_run
from cs336_alignment.tensors.masked import masked_normalize


def instruction_tune(config: InstructionTuneConfig) -> dict[str, float]:
    """Tune a model on instructions, or resume doing so, and return its last metrics.

    `train/*` are those of `sft_update`; `eval/loss` is the mean of −log p over the tokens of the evaluation sequences.

    Raises:
        ValueError, FileNotFoundError: the data, the model, a checkpoint or the configuration is not usable.
        FloatingPointError: training has diverged; the message names the file with the batch.
        OSError: a checkpoint cannot be written.
    """
    if config.eval_data is not None:
        train_documents, eval_documents = load_demonstrations(config.train_data), load_demonstrations(config.eval_data)
        check_no_overlap(train_documents, eval_documents, config.allow_overlap)
    with open_run(config) as run:
        train = pack(run, config.train_data, config.seq_length, config.seed)
        held_out = pack(run, config.eval_data, config.seq_length, seed=0) if config.eval_data else None
        epochs = Epochs(len(train), config.batch_size, config.epochs, config.seed)
        run.log.expect(epochs.updates)
        if run.start == 0 and held_out is not None:
            evaluate_loss(config, run, held_out, 0)
        for update in run.steps(epochs.updates):
            batch = [as_example(train, index) for index in epochs.batch(update)]
            lr = config.optimizer.lr_at(update, epochs.updates)
            run.log.write("train", update, sft_update(run, batch, config.imitation, update, lr))
            run.progress["update"] = update
            if held_out is not None and (update % config.eval_every == 0 or update == epochs.updates):
                evaluate_loss(config, run, held_out, update)
        return run.log.latest


def evaluate_loss(config: InstructionTuneConfig, run: TrainingRun, dataset: PackedSftDataset, update: int) -> None:
    """Compute the loss on held-out sequences, and log it."""
    with run.log.phase("evaluation"):
        loss = mean_loss(run.policy, dataset, config)
    run.log.write("eval", update, {"loss": loss, **run.log.pop_phase_seconds()})


@torch.no_grad()
def mean_loss(policy: Policy, dataset: PackedSftDataset, config: InstructionTuneConfig) -> float:
    """Compute the mean of −log p over the tokens of a data set's first `eval_sequences` sequences."""
    count = min(len(dataset), config.eval_sequences or len(dataset))
    model = policy.model.eval()
    total = 0.0
    for indices in split_into_microbatches([config.seq_length + 1] * count, config.optimizer, config.batch_size):
        batch = policy.response_log_probs([as_example(dataset, index) for index in indices])
        total -= masked_normalize(batch.log_probs, batch.mask).item()
    model.train()
    return total / (count * config.seq_length)


def as_example(dataset: PackedSftDataset, index: int) -> TokenizedExample:
    """Turn a sequence into a prompt of one token, which nothing predicts, and a response: all of its labels."""
    sequence = dataset[index]
    return TokenizedExample((int(sequence["input_ids"][0]),), tuple(sequence["labels"].tolist()))


def pack(run: TrainingRun, path: Path, seq_length: int, seed: int) -> PackedSftDataset:
    """Read a file as packed sequences.

    Raises:
        ValueError: the sequences are longer than the model's context, or the file is too short for one.
    """
    context = run.policy.context_length
    if seq_length > context:
        raise ValueError(f"seq_length is {seq_length}, but the model's context is {context}; choose at most that")
    return PackedSftDataset(run.policy.tokenizer, path, seq_length, shuffle=True, seed=seed)
