"""What a training run depends on: its options, their checks, and the optimizers that can be named.

Importing this module does not import PyTorch, so a command line can show its help quickly.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from cs336_basics.model_config import ModelConfig
from cs336_basics.run_folder import check_same_configuration, config_to_json, stored_config

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class OptimizerChoice:
    """An optimizer that `OptimizerConfig.name` may name."""

    class_path: str
    """Where its class is. It takes AdamW's options."""
    help: str
    """Which parameters it updates."""
    more_options: tuple[str, ...] = ()
    """Fields of `OptimizerConfig` that it takes in addition to AdamW's."""

    def load(self) -> "type[torch.optim.Optimizer]":
        """Import the class."""
        module, _, name = self.class_path.rpartition(".")
        return getattr(import_module(module), name)


#: To add an optimizer, add a line. The command line's choices and help and the checks below follow from this table.
OPTIMIZERS = {
    "adamw": OptimizerChoice("cs336_basics.optimizer.AdamW", "AdamW for all parameters"),
    "muon": OptimizerChoice(
        "cs336_basics.muon.Muon", "Muon for the matrices of the blocks, AdamW for the rest", ("momentum",)
    ),
    "normuon": OptimizerChoice(
        "cs336_basics.muon.NorMuon", "the same with NorMuon, whose rows get updates of one size", ("momentum",)
    ),
}
_OPTIMIZER_HELP = "The optimizer. " + "; ".join(f"{name}: {choice.help}" for name, choice in OPTIMIZERS.items())
if TYPE_CHECKING:
    OptimizerName = str
else:
    OptimizerName = Literal[tuple(OPTIMIZERS)]


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and its learning-rate schedule: a linear warm-up, then half a cosine wave or a trapezoid."""

    lr: float = 1e-3
    """Highest learning rate."""
    min_lr: float = 1e-4
    """Learning rate of the last step."""
    warmup_steps: int = 100
    """Steps of linear warm-up."""
    beta1: float = 0.9
    """Decay rate of the first moment."""
    beta2: float = 0.95
    """Decay rate of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Clip the gradients to this joint L2 norm; inf turns clipping off."""
    decay_steps: int | None = None
    """Hold the highest learning rate until this many steps before the end, then lower it linearly to min_lr. By
    default, lower it along half a cosine wave from the end of the warm-up to the last step."""
    name: Annotated[OptimizerName, tyro.conf.arg(aliases=["--optimizer"], help=_OPTIMIZER_HELP)] = "adamw"
    """One of `OPTIMIZERS`."""
    momentum: float = 0.95
    """Decay rate of Muon's momentum."""

    def __post_init__(self) -> None:
        if self.name not in OPTIMIZERS:
            raise ValueError(f"optimizer {self.name!r} is unknown; choose one of {', '.join(OPTIMIZERS)}")
        for name in ("lr", "min_lr", "warmup_steps", "eps", "weight_decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, but must not be negative")
        if self.max_grad_norm <= 0:
            raise ValueError(f"max_grad_norm is {self.max_grad_norm}, but must be positive; inf turns clipping off")
        if self.decay_steps is not None and self.decay_steps < 1:
            raise ValueError(f"decay_steps is {self.decay_steps}, but must be at least 1, or None for a cosine wave")

    def lr_at(self, step: int, steps: int) -> float:
        """Return the learning rate of a step, 1 to `steps`."""
        from cs336_basics.optimizer import get_cosine_lr, get_trapezoid_lr

        if self.decay_steps is None:
            return get_cosine_lr(step, self.lr, self.min_lr, self.warmup_steps, steps)
        return get_trapezoid_lr(step, self.lr, self.min_lr, self.warmup_steps, self.decay_steps, steps)

    def optimizer_class(self) -> "type[torch.optim.Optimizer]":
        """Return the class of the optimizer; `options` are its arguments."""
        return OPTIMIZERS[self.name].load()

    def options(self) -> dict[str, Any]:
        """Return the arguments of the optimizer, except for its parameters."""
        adamw = {"lr": self.lr, "betas": (self.beta1, self.beta2), "eps": self.eps, "weight_decay": self.weight_decay}
        return adamw | {name: getattr(self, name) for name in OPTIMIZERS[self.name].more_options}


@dataclass(frozen=True)
class TrainConfig:
    """Everything that a training run depends on."""

    run_dir: Annotated[Path, tyro.conf.arg(aliases=["--run"])] = Path("runs/train")
    """Run folder. If it exists, its training is resumed."""
    train_data: Path = Path("data/train.npy")
    """Token file to train on, made by `tokenize`."""
    valid_data: Path = Path("data/valid.npy")
    """Token file to evaluate on."""
    tokenizer: Path | None = None
    """Folder of the tokenizer, which is copied into the run folder. Default: that of train_data, if it has one."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Shape of the model."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer and learning-rate schedule."""
    steps: int = 5_000
    """Optimizer steps."""
    batch_size: int = 32
    """Sequences per step, over all ranks and microbatches."""
    microbatches: int = 1
    """Gradient accumulation: split each rank's share of a batch into this many parts. More parts need less memory."""
    seed: int = 0
    """Determines the initial weights and the order of the data."""
    device: str = "auto"
    """cpu, cuda, mps, or auto for a GPU if there is one."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 computes under autocast; weights and optimizer state stay in float32."""
    compile: bool = False
    """Compile the model with torch.compile."""
    log_every: int = 10
    """Steps between writes to metrics.jsonl. Every step is recorded, but the program waits for the GPU only here."""
    eval_every: int = 250
    """Steps between evaluations."""
    eval_sequences: Annotated[int | None, tyro.conf.arg(aliases=["--eval-windows"])] = 512
    """Evaluate on this many sequences from the start of the validation file; None takes the whole file."""
    checkpoint_every: int = 500
    """Steps between checkpoints. The last step always gets one."""
    keep_checkpoints: int = 2
    """Keep this many checkpoints and delete older ones."""
    wandb_project: str | None = None
    """Send the metrics to this W&B project too."""

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}, but must not be negative")
        intervals = ("log_every", "eval_every", "checkpoint_every", "keep_checkpoints")
        for name in ("steps", "batch_size", "microbatches", *intervals):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be at least 1")
        if self.eval_sequences is not None and self.eval_sequences < 1:
            raise ValueError(
                f"eval_sequences is {self.eval_sequences}, but must be at least 1, or None for the whole file"
            )
        if self.batch_size % self.microbatches:
            raise ValueError(f"batch_size {self.batch_size} does not split into {self.microbatches} equal microbatches")
        warmup, decay = self.optimizer.warmup_steps, self.optimizer.decay_steps
        if decay is not None and warmup + decay > self.steps + 1:
            raise ValueError(
                f"warmup_steps {warmup} and decay_steps {decay} do not fit into {self.steps} steps; lower them too"
            )


#: Fields that a resumed run may change, because the weights do not depend on them.
MAY_CHANGE = {
    *("run_dir", "tokenizer", "device", "compile", "log_every", "eval_every", "eval_sequences"),
    *("checkpoint_every", "keep_checkpoints", "wandb_project"),
}
#: Options of the leaderboard's experiments that older configurations name. They were off by default.
REMOVED_FIELDS = ("start_batch_size", "start_context", "logit_softcap", "value_embeddings")


def check_resumable(config: TrainConfig) -> None:
    """Refuse to resume the run in `config.run_dir` with a different configuration.

    Raises:
        ValueError: the configurations differ, or `config.json` is damaged.
    """
    stored, requested = _stored_config(config.run_dir), config_to_json(config)
    _refuse_removed_fields(config.run_dir, stored, requested)
    _refuse_removed_fields(config.run_dir, stored["model"], requested["model"])
    check_same_configuration(config.run_dir, config, MAY_CHANGE, defaults=config_to_json(type(config)()))


def read_model_config(run_dir: Path) -> ModelConfig:
    """Read the shape of the model that was trained in a run folder.

    Raises:
        FileNotFoundError: the folder has no `config.json`.
        ValueError: the file is damaged, or the model has a feature that `ModelConfig` does not describe.
    """
    stored, known = _stored_config(run_dir)["model"], [item.name for item in fields(ModelConfig)]
    _refuse_removed_fields(run_dir, stored, known)
    return ModelConfig(**{name: stored[name] for name in known if name in stored})


def _stored_config(run_dir: Path) -> dict[str, Any]:
    config = stored_config(run_dir)
    if not isinstance(config.get("model"), dict):
        path = run_dir / "config.json"
        raise ValueError(f"{path} is damaged: it describes no model; restore it, or delete {run_dir} to start again")
    return config


def _refuse_removed_fields(run_dir: Path, stored: Mapping[str, Any], known: Collection[str]) -> None:
    for name in REMOVED_FIELDS:
        if stored.get(name) and name not in known:
            raise ValueError(
                f"{run_dir} was trained with {name} {stored[name]}, which only experiments/leaderboard/model.py "
                "supports; use its classes, or train a new run"
            )
