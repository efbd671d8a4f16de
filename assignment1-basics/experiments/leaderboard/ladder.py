"""The leaderboard in miniature: the lowest loss on the broad corpus in five minutes on one GPU.

A ladder of short runs with a time limit finds the recipe: each run makes one change to the best recipe so far, and the
change is kept if it lowers the validation loss. Then the recipe, some variants of it and the baseline get five minutes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from experiments.leaderboard.config import LeaderboardConfig
from experiments.models import TrainModels
from experiments.results import RESULTS
from experiments.sweep import Attention, Run, run_here

#: The number of steps that the configurations below are written for; a run with a time limit scales them.
STEPS = 1000
#: A change is kept if it lowers the loss by at least this much, in nats. Two equal runs may differ by 0.01.
LEAST_GAIN = 0.005

#: The changes, in the order in which they are tried. Keys are fields of `LeaderboardConfig` ("model." and "optimizer."
#: come before the fields of its parts) or "attention". A key that ends in " x" multiplies the learning rates or the
#: batch, or sets the start of a growth to this share of its end. A second try is for a change that missed the time
#: limit by half a second, or that may need a change that was kept since.
LADDER: dict[str, Mapping[str, Any]] = {
    "FlashAttention": {"attention": "flash"},
    "12 blocks of width 768, context 512": {
        "model.d_model": 768,
        "model.num_layers": 12,
        "model.num_heads": 12,
        "model.context_length": 512,
        "batch_size": 64,
        "lr x": 0.5,
    },
    "half the rate": {"lr x": 0.5},
    "tied embeddings": {"model.tie_embeddings": True},
    "QK-norm": {"model.qk_norm": True},
    "ReLU² for SwiGLU": {"model.ffn": "relu2"},
    "heads of width 64": {"model.num_heads": 8},
    "heads of width 128": {"model.num_heads": 4},
    "soft cap of 15": {"model.logit_softcap": 15.0},
    "value embeddings in 2 blocks": {"model.value_embeddings": 2},
    "Muon": {"optimizer.name": "muon"},
    "NorMuon": {"optimizer.name": "normuon"},
    "twice the rate": {"lr x": 2.0},
    "straight down to zero": {"optimizer.decay_steps": STEPS - STEPS // 20, "optimizer.min_lr": 0.0},
    "QK-norm, second try": {"model.qk_norm": True},
    "NorMuon, second try": {"optimizer.name": "normuon"},
    "twice the rate, second try": {"lr x": 2.0},
    "weight decay of 0.5": {"optimizer.weight_decay": 0.5},
    "context 512": {"model.context_length": 512, "batch_size x": 0.5},
    "half the batch": {"batch_size x": 0.5},
    "batch from a quarter": {"start_batch_size x": 0.25},
    "context from a quarter": {"start_context x": 0.25},
    "heads of width 64, second try": {"model.num_heads": 8},
}

#: A larger model for the long time limit, in which it reads the text less often. QK-norm is for stability; without
#: growth there are fewer shapes to compile, each of which takes minutes for twelve blocks.
LARGER: Mapping[str, Any] = {
    "model.d_model": 768,
    "model.num_layers": 12,
    "model.num_heads": 12,
    "model.qk_norm": True,
    "start_context": None,
    "lr x": 0.5,
}
FINALS: dict[str, Mapping[str, Any]] = {
    "recipe": {},
    "12 blocks of width 768": LARGER,
    "12 blocks of width 768, weight decay of 1.5": {**LARGER, "optimizer.weight_decay": 1.5},
    "16 blocks of width 1024, weight decay of 1.5": {
        **LARGER,
        "model.d_model": 1024,
        "model.num_layers": 16,
        "model.num_heads": 16,
        "optimizer.weight_decay": 1.5,
    },
}


@dataclass(frozen=True)
class Recipe:
    """The configuration of a run, and its attention."""

    config: LeaderboardConfig
    attention: Attention = "plain"

    def changed(self, changes: Mapping[str, Any]) -> "Recipe":
        """Return the recipe with some changes, whose keys are described at `LADDER`."""
        recipe = self
        for key, value in changes.items():
            if key == "attention":
                recipe = replace(recipe, attention=value)
                continue
            config = recipe.config
            part, _, name = key.rpartition(".")
            if key == "lr x":
                old = config.optimizer
                config = replace(config, optimizer=replace(old, lr=value * old.lr, min_lr=value * old.min_lr))
            elif key.endswith(" x"):
                name = key.removesuffix(" x")
                whole = config.model.context_length if name == "start_context" else config.batch_size
                multiplied: dict[str, Any] = {name: int(value * whole)}
                config = replace(config, **multiplied)
            elif part:
                config = replace(config, **{part: replace(getattr(config, part), **{name: value})})
            else:
                config = replace(config, **{name: value})
            recipe = replace(recipe, config=config)
        return recipe

    def run(self, problem: str, name: str, seconds: float) -> Run:
        """Return a run of this recipe with a time limit."""
        return Run(problem, name, self.config, self.attention, seconds)


@dataclass(frozen=True)
class Leaderboard:
    """Climb the ladder, then run the finals. Runs that are already in the results are not repeated."""

    broad: Path = Path("data/owt")
    """Folder with train.npy and valid.npy of the broad corpus."""
    seconds: float = 40.0
    """Time limit of the ladder's runs."""
    final_seconds: float = 300.0
    """Time limit of the finals."""
    finals: tuple[str, ...] = ()
    """Finals to run after the ladder: baseline, or names from FINALS. Default: none."""
    last: int | None = None
    """Stop after this many changes of the ladder, to continue later."""
    device: str = "auto"
    """cpu, cuda, or auto for a GPU if there is one."""
    runs: Path = Path("runs/experiments")
    """Folder to create the run folders in."""
    out: Path = RESULTS
    """Folder of the results."""

    def __post_init__(self) -> None:
        if unknown := set(self.finals) - {"baseline", *FINALS}:
            raise ValueError(f"there is no final {unknown.pop()!r}; there are baseline, {', '.join(FINALS)}")

    def execute(self) -> None:
        """Train what has not been trained yet."""
        baseline = Recipe(self.baseline())
        recipe = self.climb(baseline)
        for name in self.finals:
            entrant = baseline if name == "baseline" else recipe.changed(FINALS[name])
            entrant = replace(entrant, config=replace(entrant.config, eval_every=STEPS // 10))
            run_here(entrant.run("leaderboard_finals", name, self.final_seconds), self.runs, self.out)

    def climb(self, recipe: Recipe) -> Recipe:
        """Return the recipe that the ladder ends with."""
        first = run_here(recipe.run("leaderboard", "baseline", self.seconds), self.runs, self.out)
        if first["status"] != "finished":
            raise ValueError(f"the baseline is {first['status']}, so nothing can be compared with it; change --seconds")
        best = first["valid_loss"]
        for name, changes in list(LADDER.items())[: self.last]:
            candidate = recipe.changed(changes)
            if candidate == recipe:  # an earlier change has made it already
                continue
            row = run_here(candidate.run("leaderboard", name, self.seconds), self.runs, self.out)
            if row["status"] == "finished" and row["valid_loss"] < best - LEAST_GAIN:
                recipe, best = candidate, row["valid_loss"]
                print(f"kept: {name}")
        return recipe

    def baseline(self) -> LeaderboardConfig:
        """Return the course's model, with the learning rate that was best for TinyStories."""
        base = TrainModels(broad=self.broad, device=self.device).base("owt", STEPS, eval_every=STEPS)
        config = LeaderboardConfig.of(base)
        return replace(config, optimizer=replace(config.optimizer, warmup_steps=STEPS // 20))
