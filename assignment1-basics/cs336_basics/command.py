"""Running a command of a command line: its options are the fields of a dataclass, its mistakes one line each."""

import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import tyro
from tyro.conf import OmitArgPrefixes


def run_command(
    commands: Any, program: str, args: Sequence[str] | None = None, *, interrupted: str, out_of_memory: str
) -> None:
    """Read a command from the command line and execute it; what a user got wrong is one line and exit status 2.

    Args:
        commands: a union of dataclasses, one a command, each with a method `execute`.
        program: the name that help and errors begin with.
        args: the words after the program's name. Default: those that it was started with.
        interrupted: what becomes of the work when Ctrl-C ends it, with exit status 130.
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
    except BrokenPipeError:  # the reader of our output, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        fail(f"{error.strerror}: {error.filename}" if error.filename else str(error))
    except RuntimeError as error:
        torch = sys.modules.get("torch")  # which takes seconds to import, and who has not done so has no such error
        full = torch is not None and isinstance(error, torch.OutOfMemoryError)
        if not full and "out of memory" not in str(error).lower():  # as vLLM says it
            raise
        fail(f"the GPU's memory is full ({str(error).splitlines()[0]}); {out_of_memory}")
    except (ValueError, FloatingPointError) as error:
        fail(str(error))
