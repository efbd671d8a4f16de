"""The leaderboard in miniature: the lowest loss on the broad corpus in five minutes of one GPU.

A ladder finds the recipe: runs against a short clock, each with one change to the best recipe so far, which keeps the
change if it lowers the validation loss. Then the recipe, some variants of it and the naive baseline get five minutes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from experiments.leaderboard_config import LeaderboardConfig
from experiments.models import TrainModels
from experiments.results import RESULTS
from experiments.sweep import Attention, Run, run_here

#: Steps that configurations below are written for; a run against the clock stretches them.
STEPS = 1000
#: By how much, in nats, a change has to lower the loss to be kept. The same run twice may differ by 0.01.
LEAST_GAIN = 0.005

#: Changes, tried in this order. Keys are fields of `TrainConfig`, with "model." or "optimizer." before those of its
#: parts, or "attention". A key that ends in " x" multiplies: the learning rates, the batch, or for the start of a
#: growth what it grows to. A second try is for what was out of time by half a second, or may need what was kept since.
LADDER: dict[str, Mapping[str, Any]] = {
    "FlashAttention": {"attention": "flash"},
    "12 blocks of width 768, context 512": {
        "model.d_model": 768, "model.num_layers": 12, "model.num_heads": 12, "model.context_length": 512,
        "batch_size": 64, "lr x": 0.5,
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
}  # fmt: skip

#: The recipe for the long clock: a larger model reads the text less often in the same time. QK-norm is for stability;
#: without growth there are fewer shapes to compile, which takes minutes for twelve blocks.
LARGER: Mapping[str, Any] = {
    "model.d_model": 768, "model.num_layers": 12, "model.num_heads": 12, "model.qk_norm": True, "start_context": None,
    "lr x": 0.5,
}  # fmt: skip
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
        """With some changes, whose keys are those of `LADDER`."""
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
        return Run(problem, name, self.config, self.attention, seconds)


@dataclass(frozen=True)
class Leaderboard:
    """Climb the ladder, or run the finals; what is in the results already is not done again."""

    broad: Path = Path("data/owt")
    """Folder of the broad corpus' train.npy and valid.npy."""
    seconds: float = 40.0
    """The short clock, of the ladder's runs."""
    final_seconds: float = 300.0
    """The long clock."""
    finals: tuple[str, ...] = ()
    """Run these under the long clock: baseline, or names from FINALS. Default: climb the ladder."""
    last: int | None = None
    """Stop after so many changes of the ladder, to go on later."""
    device: str = "auto"
    """cpu, cuda, or auto for a GPU if there is one."""
    runs: Path = Path("runs/experiments")
    """Folder for the folders of the runs."""
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
        """The recipe that the ladder ends with."""
        first = run_here(recipe.run("leaderboard", "baseline", self.seconds), self.runs, self.out)
        if first["status"] != "finished":
            raise ValueError(
                f"the baseline is {first['status']}, and nothing can be compared with it; change --seconds"
            )
        best = first["valid_loss"]
        for name, changes in list(LADDER.items())[: self.last]:
            candidate = recipe.changed(changes)
            if candidate == recipe:  # it has come in with a change before
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
