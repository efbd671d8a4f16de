"""The command line: `cs336-systems <command>`, or `python -m cs336_systems <command>`."""

from collections.abc import Sequence
from typing import Annotated

import tyro

from cs336_basics.command import run_command
from cs336_systems.accounting import Accounting
from cs336_systems.bench_allreduce import BenchAllreduce
from cs336_systems.bench_attention import BenchAttention
from cs336_systems.bench_ddp import BenchDdp
from cs336_systems.bench_flash import BenchFlash
from cs336_systems.bench_fsdp import BenchFsdp
from cs336_systems.bench_sharding import BenchSharding
from cs336_systems.bench_step import BenchStep
from cs336_systems.bucket_model import FitBuckets
from cs336_systems.checkpointing import Checkpointing
from cs336_systems.leaderboard import Leaderboard2025
from cs336_systems.leaderboard_2026 import Leaderboard2026
from cs336_systems.memory import Memory
from cs336_systems.mixed_precision import MixedPrecision
from cs336_systems.profiling import Profile
from cs336_systems.scaling import Scaling
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
    | Annotated[Leaderboard2026, tyro.conf.subcommand("leaderboard-2026")]
    | Annotated[BenchAllreduce, tyro.conf.subcommand("bench-allreduce")]
    | Annotated[BenchDdp, tyro.conf.subcommand("bench-ddp")]
    | Annotated[BenchSharding, tyro.conf.subcommand("bench-sharding")]
    | Annotated[BenchFsdp, tyro.conf.subcommand("bench-fsdp")]
    | Annotated[Scaling, tyro.conf.subcommand("scaling")]
    | Annotated[Accounting, tyro.conf.subcommand("accounting")]
    | Annotated[FitBuckets, tyro.conf.subcommand("fit-buckets")]
)


def main(args: Sequence[str] | None = None) -> None:
    """Run a command; what a user got wrong is one line and exit status 2."""
    run_command(
        Command,
        "cs336-systems",
        args,
        interrupted="rows measured so far are in the folder that --out names; train goes on from its last checkpoint",
        out_of_memory="choose a smaller model, batch or sequence",
    )


if __name__ == "__main__":
    main()
