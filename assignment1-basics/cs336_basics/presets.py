"""The course's configurations, by name. To add a preset, add it to `TRAIN`."""

from pathlib import Path

from cs336_basics.model_config import ModelConfig
from cs336_basics.train_config import OptimizerConfig, TrainConfig

_GPT2 = {  # Radford et al. 2019, table 2; d_ff = 4 d_model as in the course
    "gpt2-small": ModelConfig(50_257, 1024, 768, 12, 12, 3072),
    "gpt2-medium": ModelConfig(50_257, 1024, 1024, 24, 16, 4096),
    "gpt2-large": ModelConfig(50_257, 1024, 1280, 36, 20, 5120),
    "gpt2-xl": ModelConfig(50_257, 1024, 1600, 48, 25, 6400),
}

#: Presets of `train`: name -> (what it is, configuration).
TRAIN: dict[str, tuple[str, TrainConfig]] = {
    "tinystories-17m": (
        "the course's base model on TinyStories: 327 680 000 tokens; for a GPU",
        TrainConfig(
            run_dir=Path("runs/tinystories-17m"),
            train_data=Path("data/tinystories/train.npy"),
            valid_data=Path("data/tinystories/valid.npy"),
            model=ModelConfig(10_000, 256, 512, 4, 16),
            steps=10_000,
            batch_size=128,
            precision="bfloat16",
            compile=True,
        ),
    ),
    "tinystories-40m-tokens": (
        "tinystories-17m in the low-resource setting: 40 960 000 tokens",
        TrainConfig(
            run_dir=Path("runs/tinystories-40m-tokens"),
            train_data=Path("data/tinystories/train.npy"),
            valid_data=Path("data/tinystories/valid.npy"),
            model=ModelConfig(10_000, 256, 512, 4, 16),
            steps=5_000,
            batch_size=32,
        ),
    ),
    "owt": (
        "the model and steps of tinystories-17m on OpenWebText, with a vocabulary of 32 000; for a GPU",
        TrainConfig(
            run_dir=Path("runs/owt"),
            train_data=Path("data/owt/train.npy"),
            valid_data=Path("data/owt/valid.npy"),
            model=ModelConfig(32_000, 256, 512, 4, 16),
            steps=10_000,
            batch_size=128,
            precision="bfloat16",
            compile=True,
        ),
    ),
    "owt-leaderboard": (
        "the recipe of experiments/leaderboard/ladder.py, sized for 1.5 hours on an H100 with Assignment 2's attention",
        TrainConfig(
            run_dir=Path("runs/owt-leaderboard"),
            train_data=Path("data/owt/train.npy"),
            valid_data=Path("data/owt/valid.npy"),
            model=ModelConfig(32_000, 512, 768, 12, 12, tie_embeddings=True, qk_norm=True),
            optimizer=OptimizerConfig(
                lr=4e-3, min_lr=0.0, warmup_steps=1_800, decay_steps=34_200, weight_decay=0.1, name="normuon"
            ),
            steps=36_000,
            batch_size=128,
            eval_every=2_000,
            checkpoint_every=4_000,
            precision="bfloat16",
            compile=True,
        ),
    ),
    **{
        name: (
            f"a model shaped like {name.replace('gpt2-', 'GPT-2 ')}, with GPT-2's vocabulary; for a large GPU",
            TrainConfig(
                run_dir=Path("runs") / name,
                train_data=Path("data/owt-gpt2/train.npy"),
                valid_data=Path("data/owt-gpt2/valid.npy"),
                model=model,
                optimizer=OptimizerConfig(lr=6e-4, min_lr=6e-5, warmup_steps=1_000),
                steps=100_000,
                batch_size=128,
                microbatches=16,
                precision="bfloat16",
                compile=True,
            ),
        )
        for name, model in _GPT2.items()
    },
}

#: Presets of `accounting`: name -> model.
MODELS: dict[str, ModelConfig] = {name: config.model for name, (_, config) in TRAIN.items()}
