"""The command line: `cs336-systems <command>`, or `python -m cs336_systems <command>`."""

import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import torch
import tyro
from tyro.conf import OmitArgPrefixes

from cs336_systems.bench_attention import BenchAttention
from cs336_systems.bench_flash import BenchFlash
from cs336_systems.bench_step import BenchStep
from cs336_systems.checkpointing import Checkpointing
from cs336_systems.leaderboard import Leaderboard2025
from cs336_systems.memory import Memory
from cs336_systems.mixed_precision import MixedPrecision
from cs336_systems.profiling import Profile

Command = (
    Annotated[BenchStep, tyro.conf.subcommand("bench-step")]
    | Annotated[Profile, tyro.conf.subcommand("profile")]
    | Annotated[Memory, tyro.conf.subcommand("memory")]
    | Annotated[Checkpointing, tyro.conf.subcommand("checkpointing")]
    | Annotated[MixedPrecision, tyro.conf.subcommand("mixed-precision")]
    | Annotated[BenchAttention, tyro.conf.subcommand("bench-attention")]
    | Annotated[BenchFlash, tyro.conf.subcommand("bench-flash")]
    | Annotated[Leaderboard2025, tyro.conf.subcommand("leaderboard-2025")]
)


def main(args: Sequence[str] | None = None) -> None:
    """Run a command; what a user got wrong is one line and exit status 2."""
    try:
        command: Any = tyro.cli(Command, prog="cs336-systems", args=args, config=(OmitArgPrefixes,))
        command.execute()
    except KeyboardInterrupt:
        _fail("interrupted; the rows measured so far are in the folder that --out names", status=130)
    except BrokenPipeError:  # the reader of our output, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        _fail(f"{error.strerror}: {error.filename}" if error.filename else str(error))
    except torch.OutOfMemoryError as error:
        _fail(f"the GPU's memory is full ({str(error).splitlines()[0]}); choose a smaller model, batch or sequence")
    except ValueError as error:
        _fail(str(error))


def _fail(message: str, status: int = 2) -> None:
    print(f"cs336-systems: {message}", file=sys.stderr)
    raise SystemExit(status)


if __name__ == "__main__":
    main()
