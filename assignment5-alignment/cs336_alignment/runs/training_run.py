"""The frame of every training program: open the run folder, resume, save checkpoints, stop on Ctrl-C.

A run folder holds `config.json`, `metrics.jsonl`, `generations/` and `checkpoints/`. Running the same command on an
existing folder resumes the run.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from transformers import PreTrainedTokenizerBase

from cs336_alignment.policy.loading import load_model, load_tokenizer, resolve_device
from cs336_alignment.policy.optimizer import AccumulatedGradients, DivergedError, PolicyOptimizer
from cs336_alignment.policy.policy import Policy
from cs336_alignment.run_folder import (
    check_same_configuration,
    check_wandb,
    config_to_json,
    deferred_interrupt,
    write_atomically,
    write_config,
)
from cs336_alignment.runs.checkpoint import (
    TrainerState,
    latest_checkpoint,
    load_trainer_state,
    save_checkpoint,
    seed_everything,
    set_random_state,
)
from cs336_alignment.runs.config import MAY_CHANGE, TrainingConfig
from cs336_alignment.runs.run_log import RunLog, describe_environment


@runtime_checkable
class SupportsJson(Protocol):
    """An element of a batch that can be written to a file."""

    def as_json(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """Return the element as plain data for JSON."""
        ...


@dataclass
class TrainingRun:
    """A run in progress; see `open_run`."""

    config: TrainingConfig
    source: Path | str
    """The folder or name that the policy was loaded from."""
    policy: Policy
    optimizer: PolicyOptimizer
    log: RunLog
    start: int
    """Number of steps that were done before; 0 for a new run."""
    progress: dict[str, Any]
    """State of the program that checkpoints keep. The program stores the number of updates so far here, as `update`."""
    _random_state: dict[str, Any]
    _interrupted: Callable[[], bool]

    def steps(self, total: int) -> Iterator[int]:
        """Yield the numbers of the remaining steps, from 1 to `total`, and save checkpoints between them.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed during the last step, of which there is now a checkpoint.
        """
        if self._random_state:  # only now, because creating an engine may have used random numbers
            set_random_state(self._random_state)
        if self.start >= total:
            self.log.console.print(f"{self.config.run_dir} is complete", soft_wrap=True)
        if self._interrupted():  # during the preparations, which leave nothing to save
            raise KeyboardInterrupt
        for step in range(self.start + 1, total + 1):
            yield step
            self.log.show_line()
            stop_now = self._interrupted()
            if stop_now or step == total or step % self.config.checkpoint_every == 0:
                self.save(step)
            if stop_now:
                raise KeyboardInterrupt

    def save(self, step: int) -> None:
        """Write a checkpoint."""
        with self.log.phase("checkpoint"):
            save_checkpoint(
                self.config.run_dir,
                step,
                self.policy.model,
                self.policy.tokenizer,
                self.optimizer.optimizer,
                self.config.keep_checkpoints,
                **self.progress,
            )

    @contextmanager
    def optimizer_step(self, update: int, lr: float, batch: Sequence[SupportsJson]) -> Iterator[AccumulatedGradients]:
        """Update the policy once, with the gradients that are accumulated inside the `with` block.

        Args:
            update: number of the update.
            lr: its learning rate.
            batch: what the gradients come from. It is saved if training diverges.

        Raises:
            FloatingPointError: training has diverged; the message names the file with the batch.
        """
        with self.log.phase("update"):
            try:
                with self.optimizer.accumulate(lr) as gradients:
                    yield gradients
            except DivergedError as error:
                path = self.config.run_dir / f"diverged_at_{update}.json"
                rows = [each.as_json(self.policy.tokenizer) for each in batch]
                write_atomically(path, json.dumps(rows, indent=1) + "\n")
                raise FloatingPointError(
                    f"training has diverged at update {update}: {error}; the batch is in {path}; "
                    "lower the learning rate, or look at the batch, and start a new run"
                ) from error


@contextmanager
def open_run(config: TrainingConfig) -> Iterator[TrainingRun]:
    """Start a run, or resume it from its latest checkpoint.

    Raises:
        ValueError, FileNotFoundError: the folder holds a run with a different configuration, or something cannot be
            loaded.
    """
    checkpoint = latest_checkpoint(config.run_dir)
    if checkpoint:
        check_same_configuration(config.run_dir, config, MAY_CHANGE)
    if config.wandb_project:
        check_wandb(config.wandb_project)
    device = resolve_device(config.device)
    source = checkpoint or config.model
    model = load_model(source, device, dtype=torch.float32, gradient_checkpointing=config.gradient_checkpointing)
    policy = Policy(model.train(), load_tokenizer(source), config.precision)
    optimizer = PolicyOptimizer(model, config.optimizer)

    seed_everything(config.seed)
    state = TrainerState(0, {}, {"update": 0})
    if checkpoint:
        state = load_trainer_state(checkpoint, optimizer.optimizer)
    else:
        write_config(config.run_dir, config, describe_environment(device))
    resume_after = state.progress["update"] if checkpoint else None
    with (
        RunLog(config.run_dir, resume_after, config.wandb_project, config_to_json(config)) as log,
        deferred_interrupt(on_interrupt=log.announce_interrupt) as interrupted,
    ):
        if checkpoint:
            log.console.print(f"resuming from {checkpoint}", soft_wrap=True)
        yield TrainingRun(config, source, policy, optimizer, log, state.step, state.progress, state.random, interrupted)
