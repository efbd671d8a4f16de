"""The command line: `cs336-systems <command>`, or `python -m cs336_systems <command>`."""

from collections.abc import Sequence
from typing import Annotated

import tyro

from cs336_basics.command import run_command
from cs336_systems.accounting import Accounting
from cs336_systems.bench_attention import BenchAttention
from cs336_systems.bench_flash import BenchFlash
from cs336_systems.bench_step import BenchStep
from cs336_systems.checkpointing import Checkpointing
from cs336_systems.leaderboard import Leaderboard2025
from cs336_systems.memory import Memory
from cs336_systems.mixed_precision import MixedPrecision
from cs336_systems.profiling import Profile
from cs336_systems.train import Consolidate, Train

Command = (
    Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Consolidate, tyro.conf.subcommand("consolidate")]
    | Annotated[BenchStep, tyro.conf.subcommand("bench-step")]
    | Annotated[Profile, tyro.conf.subcommand("profile")]
    | Annotated[Memory, tyro.conf.subcommand("memory")]
    | Annotated[Checkpointing, tyro.conf.subcommand("checkpointing")]
    | Annotated[MixedPrecision, tyro.conf.subcommand("mixed-precision")]
    | Annotated[BenchAttention, tyro.conf.subcommand("bench-attention")]
    | Annotated[BenchFlash, tyro.conf.subcommand("bench-flash")]
    | Annotated[Leaderboard2025, tyro.conf.subcommand("leaderboard-2025")]
    | Annotated[Accounting, tyro.conf.subcommand("accounting")]
)


def main(args: Sequence[str] | None = None) -> None:
    """Run a command; what a user got wrong is one line and exit status 2."""
    run_command(
        Command,
        "cs336-systems",
        args,
        interrupted="the rows measured so far are in the folder that --out names",
        out_of_memory="choose a smaller model, batch or sequence",
    )


if __name__ == "__main__":
    main()
