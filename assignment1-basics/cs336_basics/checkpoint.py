"""Checkpoints: model, optimizer and step in one file that is either complete or absent."""

import io
import os
import shutil
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn

from cs336_basics.run_folder import sync

#: A path or a binary file. Static type checkers count `io.BytesIO` as IO[bytes]; run-time checkers do not.
Destination = str | os.PathLike[str] | IO[bytes] | io.BufferedIOBase


def save_checkpoint(
    model: nn.Module, optimizer: torch.optim.Optimizer, iteration: int, out: Destination, **extra: object
) -> None:
    """Write the state of a training run.

    Whatever happens meanwhile, a path ends up with the complete new file or keeps its old content: the bytes are
    written under a temporary name, reach the disk, and only then replace the file.

    Args:
        model: the model whose state is saved.
        optimizer: the optimizer whose state is saved.
        iteration: the number of steps done.
        out: a path or a binary file object.
        extra: more values to save: tensors, numbers, strings, and containers of them.

    Raises:
        OSError: the file cannot be written (disk full, no permission); the message says how to continue.
    """
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "iteration": iteration, **extra}
    if not isinstance(out, str | os.PathLike):
        torch.save(state, out)  # type: ignore[arg-type]
        return
    path = Path(out)
    unfinished = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(unfinished, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
        sync(path.parent)  # makes the rename survive a power cut
    except (OSError, RuntimeError) as error:  # torch reports a failed write as a RuntimeError
        cause = error if isinstance(error, OSError) else error.__context__ or error
        raise OSError(
            f"cannot write checkpoint {path} ({cause}); free some space or choose another folder, "
            "then run the same command again; earlier checkpoints are untouched"
        ) from error
    finally:
        unfinished.unlink(missing_ok=True)


def load_checkpoint(src: Destination, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> int:
    """Restore what `save_checkpoint` wrote, on the devices of `model` and `optimizer`.

    Returns:
        The iteration that was saved.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or its model has another shape.
    """
    return restore(read_checkpoint(src), model, optimizer, src)["iteration"]


def read_checkpoint(src: Destination) -> dict[str, Any]:
    """Read the contents of a checkpoint to the CPU. Only tensors and plain data are read, never code."""
    if isinstance(src, str | os.PathLike) and not Path(src).is_file():
        raise FileNotFoundError(f"checkpoint {src} does not exist; name a file in the run's checkpoints folder")
    try:
        state = torch.load(src, map_location="cpu", weights_only=True)  # type: ignore[arg-type]
    except Exception as error:  # torch raises RuntimeError, EOFError, UnpicklingError and more for damaged files
        first_line = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"checkpoint {src} is damaged ({first_line}); delete it to resume from the checkpoint before it"
        ) from error
    if not isinstance(state, dict) or not {"model", "optimizer", "iteration"} <= state.keys():
        raise ValueError(
            f"{src} is not a checkpoint of this package; it must contain a model, an optimizer and an iteration"
        )
    return state


def restore(
    state: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer | None, src: Destination
) -> dict[str, Any]:
    """Load the contents of a checkpoint into `model` and `optimizer`, and return them; `src` is named in errors."""
    try:
        model.load_state_dict(state["model"])
        if optimizer is not None:
            optimizer.load_state_dict(state["optimizer"])
    except (RuntimeError, ValueError, KeyError) as error:
        details = " ".join(str(error).split())
        raise ValueError(f"checkpoint {src} does not fit this model: {details[:300]}") from error
    return state


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Return where a run keeps the checkpoint of a step."""
    return run_dir / "checkpoints" / f"step_{step:08d}.pt"


def checkpoints(run_dir: Path) -> list[Path]:
    """List the complete checkpoints of a run, the oldest first. They are files, or folders of a sharded strategy."""
    return sorted((run_dir / "checkpoints").glob("step_????????.pt"))


def latest_checkpoint(run_dir: Path) -> Path | None:
    """Return the newest complete checkpoint of a run."""
    return next(reversed(checkpoints(run_dir)), None)


def delete_old_checkpoints(run_dir: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints of a run."""
    for old in checkpoints(run_dir)[:-keep]:
        shutil.rmtree(old) if old.is_dir() else old.unlink()
