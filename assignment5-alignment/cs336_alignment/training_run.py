"""What training programs do around their steps: open the run's folder, resume it, keep checkpoints, stop in order.

A run is a folder: `config.json`, `metrics.jsonl`, `generations/`, `checkpoints/`. The same command on an existing
folder resumes it.
"""

import json
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from cs336_alignment.checkpoint import (
    TrainerState,
    latest_checkpoint,
    load_trainer_state,
    save_checkpoint,
    seed_everything,
    set_random_state,
)
from cs336_alignment.policy import Policy, Precision
from cs336_alignment.policy_optimizer import DivergedError, OptimizerConfig, PolicyOptimizer
from cs336_alignment.pretrained import load_policy, load_tokenizer, resolve_device
from cs336_alignment.run_log import RunLog, check_wandb, environment, write_atomically

Microbatch = TypeVar("Microbatch")


@dataclass(frozen=True)
class TrainingConfig:
    """What every training program is told."""

    run: Path = Path("runs/train")
    """Folder of the run; an existing one is resumed."""
    model: str = "Qwen/Qwen2.5-Math-1.5B"
    """The model to start from: a folder of Hugging Face, such as a checkpoint of another run, or a name on its hub."""
    seed: int = 0
    """Fixes the order of the data and what is sampled."""
    device: str = "auto"
    """Where the policy is trained: cpu, cuda, cuda:1, …, or auto for a GPU if there is one."""
    precision: Precision = "bfloat16"
    """bfloat16 computes under autocast; weights and optimizer stay in float32."""
    gradient_checkpointing: bool = False
    """Compute activations a second time in the backward pass, which takes a third longer, instead of keeping them."""
    checkpoint_every: int = 50
    """Steps between checkpoints; the last step always gets one."""
    keep_checkpoints: int = 2
    """Older checkpoints are deleted."""
    wandb_project: str | None = None
    """Send metrics to this W&B project too."""
    allow_overlap: bool = False
    """Train even if problems of the training data are among those of the evaluation."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """How the policy is updated."""

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}, but must not be negative")
        check_at_least_one(self, "checkpoint_every", "keep_checkpoints")


#: Fields that a resumed run may change, because the weights do not depend on them but for rounding.
MAY_CHANGE = {
    *("run", "device", "checkpoint_every", "keep_checkpoints", "wandb_project", "allow_overlap"),
    *("gradient_checkpointing", "optimizer.gradient_accumulation_steps", "optimizer.microbatch_tokens"),
    *("rollouts.engine.engine_device", "rollouts.engine.gpu_memory_utilization", "rollouts.grading_workers"),
    "evaluation.log_examples",
}


def check_at_least_one(config: Any, *names: str) -> None:
    """Raise a ValueError for the first of the fields that is below 1; one that is None is left out."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}, but must be at least 1")


@dataclass
class TrainingRun:
    """A run that is under way, see `open_run`."""

    config: TrainingConfig
    source: Path | str
    """What the policy was read from."""
    policy: Policy
    optimizer: PolicyOptimizer
    log: RunLog
    start: int
    """Steps that were done before, 0 if it was not resumed."""
    progress: dict[str, Any]
    """What else the program goes on from, kept in checkpoints. It has to put the updates so far here, as `update`."""
    _random_state: dict[str, Any]
    _interrupted: Callable[[], bool]

    def steps(self, total: int) -> Iterator[int]:
        """The numbers of the steps that are left, from 1 to `total`; between two of them checkpoints are written.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed during the step before, of which there is a checkpoint now.
        """
        if self._random_state:  # only now: making an engine may have drawn numbers
            set_random_state(self._random_state)
        if self.start >= total:
            self.log.console.print(f"{self.config.run} is complete", soft_wrap=True)
        if self._interrupted():  # while things were made ready, of which there is nothing to keep
            raise KeyboardInterrupt
        for step in range(self.start + 1, total + 1):
            yield step
            stop_now = self._interrupted()
            if stop_now or step == total or step % self.config.checkpoint_every == 0:
                self.save(step)
            if stop_now:
                raise KeyboardInterrupt

    def save(self, step: int) -> None:
        """Write a checkpoint."""
        with self.log.phase("checkpoint"):
            save_checkpoint(
                self.config.run,
                step,
                self.policy.model,
                self.policy.tokenizer,
                self.optimizer.optimizer,
                self.config.keep_checkpoints,
                **self.progress,
            )

    def update(
        self,
        step: int,
        microbatches: Iterable[Microbatch],
        train_step: Callable[[Microbatch], tuple[Tensor, Mapping[str, Tensor]]],
        lr: float,
        batch: Callable[[], Any],
    ) -> dict[str, float]:
        """`PolicyOptimizer.update`; a batch that makes it diverge is saved.

        Args:
            step: number of the update.
            batch: what to save, as plain data for JSON.

        Raises:
            FloatingPointError: training has diverged; the message names the file with the batch.
        """
        with self.log.phase("update"):
            try:
                return self.optimizer.update(microbatches, train_step, lr)
            except DivergedError as error:
                path = self.config.run / f"diverged_at_{step}.json"
                write_atomically(path, json.dumps(batch(), indent=1) + "\n")
                raise FloatingPointError(
                    f"training has diverged at update {step}: {error}; the batch is in {path}; "
                    "lower the learning rate, or look at the batch, and start a new run"
                ) from error


@contextmanager
def open_run(config: TrainingConfig) -> Iterator[TrainingRun]:
    """Start a run, or resume it from its latest checkpoint.

    Raises:
        ValueError, FileNotFoundError: the folder holds a run of another configuration, or something cannot be loaded.
    """
    check_same_configuration(config)
    if config.wandb_project:
        check_wandb(config.wandb_project)
    device = resolve_device(config.device)
    checkpoint = latest_checkpoint(config.run)
    source = checkpoint or config.model
    model = load_policy(source, device, dtype=torch.float32, gradient_checkpointing=config.gradient_checkpointing)
    policy = Policy(model.train(), load_tokenizer(source), config.precision)
    optimizer = PolicyOptimizer(model, config.optimizer)

    seed_everything(config.seed)
    state = TrainerState(0, {}, {"update": 0})
    if checkpoint:
        state = load_trainer_state(checkpoint, optimizer.optimizer)
    else:
        write_config(config.run, config, device)
    resume_after = state.progress["update"] if checkpoint else None
    with (
        RunLog(config.run, resume_after, config.wandb_project, config_to_json(config)) as log,
        deferred_interrupt(log) as interrupted,
    ):
        if checkpoint:
            log.console.print(f"resuming from {checkpoint}", soft_wrap=True)
        yield TrainingRun(config, source, policy, optimizer, log, state.step, state.progress, state.random, interrupted)


@contextmanager
def deferred_interrupt(log: RunLog) -> Iterator[Callable[[], bool]]:
    """Hold Ctrl-C back until the loop asks for it between two steps; a second Ctrl-C comes through at once.

    Outside the main thread, which signals do not reach, nothing is held back.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    asked = threading.Event()
    previous = signal.getsignal(signal.SIGINT)

    def note(*_: object) -> None:
        asked.set()
        signal.signal(signal.SIGINT, previous)
        log.console.print("finishing this step to keep a checkpoint; Ctrl-C again stops at once")

    signal.signal(signal.SIGINT, note)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGINT, previous)


def write_config(folder: Path, config: Any, device: torch.device) -> None:
    """`config.json`: the configuration, and the environment that it ran in."""
    record = {"config": config_to_json(config), "environment": environment(device)}
    write_atomically(folder / "config.json", json.dumps(record, indent=1) + "\n")


def config_to_json(config: Any) -> dict[str, Any]:
    """A configuration as plain data, with paths as strings."""
    return json.loads(json.dumps(asdict(config), default=str))


def check_same_configuration(config: TrainingConfig) -> None:
    """A folder holds one run: refuse to go on from its checkpoints with another configuration."""
    if latest_checkpoint(config.run) is None:
        return
    stored, asked = _leaves(_stored_config(config.run)), _leaves(config_to_json(config))
    different = [
        f"{name} was {stored.get(name)}, now {value}"
        for name, value in sorted(asked.items())
        if name not in MAY_CHANGE and stored.get(name) != value
    ]
    if different:
        raise ValueError(
            f"{config.run} holds a run of another configuration ({'; '.join(different)}); "
            "choose another folder with --run, or delete it to start anew"
        )


def _stored_config(run: Path) -> dict[str, Any]:
    path = run / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))["config"]
        if not isinstance(config, dict):
            raise TypeError("no object")
        return config
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is damaged; restore it, or delete {run} to start anew") from None


def _leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return leaves
