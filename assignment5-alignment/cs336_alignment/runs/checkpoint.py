"""Checkpoints: a Hugging Face model folder with the states of the optimizer and of the run, complete or absent.

checkpoints/step_00000020/
    config.json, model.safetensors, tokenizer.json, …   the model, which transformers and vLLM can load
    optimizer.pt                                        state of the optimizer
    trainer_state.json                                  step, random number generators, progress of the program
"""

import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cs336_alignment.policy.loading import save_model
from cs336_alignment.run_folder import sync


@dataclass(frozen=True)
class TrainerState:
    """The state of a run, apart from model and optimizer."""

    step: int
    """Number of steps that the program has done."""
    random: dict[str, Any]
    """States of the random number generators; see `random_state`."""
    progress: dict[str, Any]
    """Further state that the program resumes from, as plain data."""


def save_checkpoint(
    run_dir: Path,
    step: int,
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    optimizer: torch.optim.Optimizer,
    keep: int,
    **progress: object,
) -> Path:
    """Write the state of a run, then delete all but the `keep` latest checkpoints.

    Everything is written under a temporary name and synced to disk before it is renamed, so a run that is killed in
    between keeps its earlier checkpoints and leaves no incomplete one.

    Raises:
        OSError: the checkpoint cannot be written (disk full, no permission); the message says how to continue.
    """
    final = checkpoint_path(run_dir, step)
    unfinished = final.with_name(final.name + ".tmp")
    try:
        for left_over in final.parent.glob("*.tmp*"):
            shutil.rmtree(left_over)
        save_model(policy, tokenizer, unfinished)
        torch.save(optimizer.state_dict(), unfinished / "optimizer.pt")
        state = {"step": step, "random": random_state(), "progress": progress}
        (unfinished / "trainer_state.json").write_text(json.dumps(state), encoding="utf-8")
        for path in (*unfinished.iterdir(), unfinished):
            sync(path)
        unfinished.replace(final)
        sync(final.parent)
    except (OSError, RuntimeError) as error:  # torch and safetensors report a failed write as a RuntimeError
        cause = error if isinstance(error, OSError) else error.__context__ or error
        raise OSError(
            f"cannot write checkpoint {final} ({cause}); free some space or choose another folder, "
            "then run the same command again: earlier checkpoints are untouched"
        ) from error
    for old in checkpoints(run_dir)[:-keep]:
        # Renamed first, so that a half-deleted folder does not count as a checkpoint
        shutil.rmtree(old.rename(old.with_name(old.name + ".tmp")))
    return final


def load_trainer_state(checkpoint: Path, optimizer: torch.optim.Optimizer) -> TrainerState:
    """Restore the optimizer from a checkpoint, and return the state of the run. The model is read by `load_model`.

    The random number generators are left alone; see `set_random_state`.

    Raises:
        ValueError: the checkpoint is damaged, or belongs to another optimizer.
    """
    try:
        stored = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        state = TrainerState(stored["step"], stored["random"], stored["progress"])
        weights = torch.load(checkpoint / "optimizer.pt", map_location="cpu", weights_only=True)
        optimizer.load_state_dict(weights)
    except Exception as error:  # a damaged file makes torch and json raise half a dozen types
        first_line = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"checkpoint {checkpoint} is damaged ({first_line}); delete it to resume from the checkpoint before it"
        ) from error
    return state


def random_state() -> dict[str, Any]:
    """Return the states of Python's, NumPy's and PyTorch's random number generators, as plain data for JSON."""
    numpy: Any = np.random.get_state(legacy=False)
    return {
        "python": random.getstate(),
        "numpy": {**numpy, "state": {**numpy["state"], "key": numpy["state"]["key"].tolist()}},
        "torch": _to_hex(torch.get_rng_state()),
        "cuda": [_to_hex(state) for state in torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Set the generators to what `random_state` returned, which may have been converted to JSON and back.

    A GPU that has no stored state, because the run was on another machine, keeps its own.
    """
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    numpy = state["numpy"]
    key = np.array(numpy["state"]["key"], dtype=np.uint32)
    np.random.set_state({**numpy, "state": {**numpy["state"], "key": key}})
    torch.set_rng_state(_from_hex(state["torch"]))
    if torch.cuda.is_available():
        for device, generator in zip(range(torch.cuda.device_count()), state["cuda"]):
            torch.cuda.set_rng_state(_from_hex(generator), device)


def seed_everything(seed: int) -> None:
    """Seed the generators of Python, NumPy and PyTorch, on all devices."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Return the folder of the checkpoint of a step."""
    return run_dir / "checkpoints" / f"step_{step:08d}"


def checkpoints(run_dir: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    return sorted((run_dir / "checkpoints").glob("step_????????"))


def latest_checkpoint(run_dir: Path) -> Path | None:
    """Return the checkpoint that a run resumes from; None if there is none."""
    return next(reversed(checkpoints(run_dir)), None)


def _to_hex(state: torch.Tensor) -> str:
    return bytes(state.tolist()).hex()


def _from_hex(text: str) -> torch.Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)
