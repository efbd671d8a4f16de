"""The command line: `cs336-systems <command>`, or `python -m cs336_systems <command>`.

A command is a dataclass of options with a method `execute`, which imports what the command needs. So `--help` imports
neither torch nor triton.
"""

from collections.abc import Sequence
from typing import Annotated, Union

import tyro

from cs336_basics.command import run_command
from cs336_systems.instruments.options import many_gpus, on_paper, one_gpu
from cs336_systems.training import options

COMMANDS: dict[str, type] = {
    "train": options.Train,
    "consolidate": options.Consolidate,
    "bench-step": one_gpu.BenchStep,
    "profile": one_gpu.Profile,
    "memory": one_gpu.Memory,
    "checkpointing": one_gpu.Checkpointing,
    "mixed-precision": one_gpu.MixedPrecision,
    "bench-attention": one_gpu.BenchAttention,
    "bench-flash": one_gpu.BenchFlash,
    "leaderboard-2025": one_gpu.Leaderboard2025,
    "leaderboard-2026": many_gpus.Leaderboard2026,
    "bench-allreduce": many_gpus.BenchAllreduce,
    "bench-ddp": many_gpus.BenchDdp,
    "bench-sharding": many_gpus.BenchSharding,
    "bench-fsdp": many_gpus.BenchFsdp,
    "scaling": many_gpus.Scaling,
    "accounting": on_paper.Accounting,
    "fit-buckets": on_paper.FitBuckets,
}


def main(args: Sequence[str] | None = None) -> None:
    """Run a command. A user's mistake is reported in one line, with exit status 2."""
    commands = [Annotated[config, tyro.conf.subcommand(name)] for name, config in COMMANDS.items()]
    run_command(
        Union[tuple(commands)],  # noqa: UP007 (made of a table)
        "cs336-systems",
        args,
        interrupted="rows measured so far are in the folder given by --out; train continues from its last checkpoint",
        out_of_memory="choose a smaller model, batch or sequence",
    )


if __name__ == "__main__":
    main()
