"""The models of the written problems, and `train-models`, which trains them.

The setting is that of the preset tinystories-17m, except for its length: 500 steps of 128 sequences are 16.4 M tokens,
6.6 passes over 10 MB of TinyStories, after which such a model generalizes best (`token_budget`). With the full data set
use `--steps 10000`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cs336_basics.presets import TRAIN
from cs336_basics.train_config import OptimizerConfig, TrainConfig
from experiments.results import RESULTS
from experiments.sweep import Run, run_all

#: The best learning rate of the sweep `learning_rate`.
BEST_LR = 4e-3
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class TrainModels:
    """Train the models of written problems. Runs that are already in the results are not repeated."""

    problems: tuple[str, ...] = ()
    """Problems whose models to train. Default: all."""
    tinystories: Path = Path("data/tinystories")
    """Folder with train.npy and valid.npy of TinyStories."""
    broad: Path = Path("data/owt")
    """Folder with train.npy and valid.npy of the broad corpus."""
    steps: int = 500
    """Steps of a TinyStories run with 128 sequences per step."""
    broad_steps: int = 1250
    """Steps of a run on the broad corpus."""
    workers: int = 1
    """Models to train side by side on one GPU."""
    minutes: float = 1e9
    """Start no further model after this many minutes."""
    device: str = "auto"
    """cpu, cuda, or auto for a GPU if there is one."""
    runs: Path = Path("runs/experiments")
    """Folder to create the run folders in."""
    out: Path = RESULTS
    """Folder of the results."""

    def __post_init__(self) -> None:
        if unknown := set(self.problems) - set(PROBLEMS):
            raise ValueError(f"there is no problem {unknown.pop()!r}; there are {', '.join(PROBLEMS)}")

    def execute(self) -> None:
        """Train them."""
        chosen = self.problems or tuple(PROBLEMS)
        runs = [run for problem in chosen for run in PROBLEMS[problem](self)]
        run_all(runs, self.runs, self.out, self.workers, self.minutes)

    def base(self, preset: str = "tinystories-17m", steps: int | None = None, **changes: Any) -> TrainConfig:
        """Return a preset with another number of steps and with this machine's data."""
        data = self.tinystories if preset.startswith("tinystories") else self.broad
        steps = steps or (self.steps if preset.startswith("tinystories") else self.broad_steps)
        config = replace(
            TRAIN[preset][1],
            train_data=data / "train.npy",
            valid_data=data / "valid.npy",
            device=self.device,
            steps=steps,
            eval_sequences=None,
            eval_every=max(1, steps // 20),
            checkpoint_every=steps,
        )
        return replace(with_lr(config, BEST_LR), **changes)


def with_lr(config: TrainConfig, lr: float) -> TrainConfig:
    """Set the highest learning rate; the lowest is a tenth of it, and the warm-up takes a tenth of the steps."""
    return replace(config, optimizer=OptimizerConfig(lr, lr / 10, warmup_steps=max(1, config.steps // 10)))


def token_budget(setting: TrainModels) -> Iterator[Run]:
    """Ask how often a model should read a corpus that is too small for it. Each run has a complete schedule."""
    for share in (0.25, 0.5, 1, 2.5):
        steps = round(share * setting.steps)
        config = setting.base(steps=steps)
        yield Run("token_budget", f"{steps} steps", config)


def learning_rate(setting: TrainModels) -> Iterator[Run]:
    """Sweep the learning rate from far too small to divergence."""
    for lr in (1e-4, 3e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2, 1e-1, 1.0):
        yield Run("learning_rate", f"lr {lr:g}", with_lr(setting.base(), lr))


def batch_size_experiment(setting: TrainModels) -> Iterator[Run]:
    """Spread the same tokens over more or fewer steps; below 128 the learning rate follows √batch_size.

    Batches of 1 and 8 would take too long for as many tokens and get fewer.
    """
    tokens = setting.steps * 128
    for batch_size in (1, 8, 32, 128, 512, 1024, 2048, 4096):
        steps = min(tokens // batch_size, 8 * setting.steps)
        config = setting.base(steps=steps, batch_size=batch_size)
        lr = BEST_LR * min(1, (batch_size / 128) ** 0.5)
        yield Run("batch_size_experiment", f"batch {batch_size}", with_lr(config, lr))


def ablations(setting: TrainModels) -> Iterator[Run]:
    """Change one part of the model at a time: layer_norm_, pre_norm_, swiglu_ablation and no_pos_emb."""
    changes: dict[str, dict[str, Any]] = {
        "baseline": {},
        "post-norm": {"norm": "post"},
        "no norm": {"norm": "none"},
        "NoPE": {"position": "none"},
        "SiLU": {"ffn": "silu"},
    }
    for name, change in changes.items():
        for seed in SEEDS:
            config = setting.base(seed=seed)
            yield Run("ablations", f"{name}, seed {seed}", replace(config, model=replace(config.model, **change)))
    for lr in (BEST_LR / 4, BEST_LR / 16):
        for name in ("baseline", "no norm", "post-norm"):
            config = with_lr(setting.base(), lr)
            config = replace(config, model=replace(config.model, **changes[name]))
            yield Run("ablations", f"{name}, lr {lr:g}", config)


def main_experiment(setting: TrainModels) -> Iterator[Run]:
    """Train the same model for the same steps on the broad corpus, at two learning rates."""
    for lr in (BEST_LR, BEST_LR / 4):
        yield Run("main_experiment", f"lr {lr:g}", with_lr(setting.base("owt"), lr))


PROBLEMS = {
    problem.__name__: problem
    for problem in (token_budget, learning_rate, main_experiment, batch_size_experiment, ablations)
}
