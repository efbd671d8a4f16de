"""Run a command of a command line. Its options are the fields of a dataclass; a user's mistake is one line."""

import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import tyro
from tyro.conf import OmitArgPrefixes


def run_command(
    commands: Any, program: str, args: Sequence[str] | None = None, *, interrupted: str, out_of_memory: str
) -> None:
    """Read a command from the command line and execute it. A user's mistake gives one line and exit status 2.

    Args:
        commands: a union of dataclasses, one per command, each with a method `execute`.
        program: the name that help and errors begin with.
        args: the words after the program's name. Default: those of this process.
        interrupted: what happens to the work when Ctrl-C ends it, with exit status 130.
        out_of_memory: what to do when the GPU's memory is full.
    """

    def fail(message: str, status: int = 2) -> NoReturn:
        print(f"{program}: {' '.join(message.split())}", file=sys.stderr)
        raise SystemExit(status)

    try:
        command: Any = tyro.cli(commands, prog=program, args=args, config=(OmitArgPrefixes,))
        command.execute()
    except KeyboardInterrupt:
        fail(f"interrupted; {interrupted}", status=130)
    except BrokenPipeError:  # the program that reads our output, for example `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        fail(f"{error.strerror}: {error.filename}" if error.filename else str(error))
    except RuntimeError as error:
        torch = sys.modules.get("torch")  # importing it takes seconds; where it is not imported, there is no such error
        full = torch is not None and isinstance(error, torch.OutOfMemoryError)
        if not full and "out of memory" not in str(error).lower():  # as vLLM says it
            raise
        fail(f"the GPU's memory is full ({str(error).splitlines()[0]}); {out_of_memory}")
    except (ValueError, FloatingPointError) as error:
        fail(str(error))
