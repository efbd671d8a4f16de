"""The folder of a run: files that are complete or absent, a record of the environment, one configuration, and Ctrl-C.

Two packages need this file and neither imports the other, so each has the same copy. Importing it is cheap: it needs
only Python's standard library until a device or W&B is asked for.
"""

import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def write_atomically(path: Path, text: str) -> None:
    """Write a text file under a temporary name, then rename it, so that readers never see half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def sync(path: Path) -> None:
    """Make the contents of a file, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the records of a `metrics.jsonl`. A last line that a killed run left unfinished is skipped."""
    records = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return records


def config_to_json(config: Any) -> dict[str, Any]:
    """Convert a configuration, which is a dataclass, to plain data with paths as strings."""
    return json.loads(json.dumps(asdict(config), default=str))


def write_config(run_dir: Path, config: Any, environment: Mapping[str, Any]) -> None:
    """Write `config.json`: the configuration of a run and the environment it started in."""
    record = {"config": config_to_json(config), "environment": environment}
    write_atomically(run_dir / "config.json", json.dumps(record, indent=1) + "\n")


def stored_config(run_dir: Path) -> dict[str, Any]:
    """Read the configuration that a run was started with.

    Raises:
        FileNotFoundError: the folder has no `config.json`.
        ValueError: the file is damaged.
    """
    path = run_dir / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{run_dir} is not a run folder: it has no config.json; train a model first")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))["config"]
        if not isinstance(config, dict):
            raise TypeError("not an object")
        return config
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is damaged; restore it, or delete {run_dir} to start again") from None


def differences(
    stored: Mapping[str, Any],
    requested: Mapping[str, Any],
    may_change: Collection[str] = (),
    defaults: Mapping[str, Any] | None = None,
) -> list[str]:
    """List how a stored configuration differs from a requested one, one phrase per field.

    Args:
        may_change: names of fields to ignore; those of nested configurations are joined by dots.
        defaults: the values of fields that did not exist yet when the stored configuration was written.
    """
    before = {**_leaves(defaults or {}), **_leaves(stored)}
    return [
        f"{name} was {before.get(name)}, now {value}"
        for name, value in sorted(_leaves(requested).items())
        if name not in may_change and before.get(name) != value
    ]


def check_same_configuration(
    run_dir: Path, config: Any, may_change: Collection[str], defaults: Mapping[str, Any] | None = None
) -> None:
    """Refuse to resume a run with another configuration; see `differences` for the arguments.

    Raises:
        ValueError: the configurations differ; the message lists the fields.
    """
    different = differences(stored_config(run_dir), config_to_json(config), may_change, defaults)
    if different:
        raise ValueError(
            f"{run_dir} holds a run with a different configuration ({'; '.join(different)}); "
            "choose another folder with --run, or delete this one to start again"
        )


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return leaves


@contextmanager
def deferred_interrupt(
    enabled: bool = True, on_interrupt: Callable[[], object] = lambda: None
) -> Iterator[Callable[[], bool]]:
    """Hold Ctrl-C back until the training loop asks for it between two steps. A second Ctrl-C acts at once.

    Outside the main thread, which signals do not reach, nothing is held back.

    Args:
        enabled: False where nothing should be held back, such as with several processes, which would be interrupted at
            different steps.
        on_interrupt: called when Ctrl-C is pressed for the first time, for example to tell the user what happens next.

    Yields:
        A function that returns whether Ctrl-C has been pressed.
    """
    if not enabled or threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    interrupted = threading.Event()
    previous = signal.getsignal(signal.SIGINT)

    def handle(*_: object) -> None:
        interrupted.set()
        signal.signal(signal.SIGINT, previous)
        on_interrupt()

    signal.signal(signal.SIGINT, handle)
    try:
        yield interrupted.is_set
    finally:
        signal.signal(signal.SIGINT, previous)


def environment(device: "torch.device", packages: Iterable[str]) -> dict[str, str | None]:
    """Describe what is needed to repeat a run: date, commit, command, versions of Python and `packages`, and device."""
    import torch

    from .machine import available_cpus

    on_gpu = device.type == "cuda"
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": _git_commit(),
        "command": shlex.join([Path(sys.argv[0].removesuffix("/__main__.py")).name, *sys.argv[1:]]),
        "python": platform.python_version(),
        **{name: _version(name) for name in packages},
        "device": torch.cuda.get_device_name(device) if on_gpu else f"{device.type}, {available_cpus()} cores",
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    if commit := os.environ.get("CS336_COMMIT"):  # for a copy of the code without its .git
        return commit
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None  # installed outside a checkout


def check_wandb(project: str) -> None:
    """Raise a ValueError if W&B is asked for but not installed."""
    try:
        import wandb  # noqa: F401
    except ImportError:
        raise ValueError(
            f"--wandb-project is {project!r}, but wandb is not installed; add it with `uv pip install wandb`"
        ) from None


def start_wandb(project: str, run_dir: Path, config: Mapping[str, Any] | None) -> Any:
    """Start a W&B run, or continue the one that this folder belongs to, and return it."""
    check_wandb(project)
    import wandb

    stored = run_dir / "wandb_id.txt"  # a resumed run continues the same curves
    if not stored.exists():
        write_atomically(stored, uuid.uuid4().hex[:12])
    return wandb.init(
        project=project, name=run_dir.name, id=stored.read_text(), dir=run_dir, config=config, resume="allow"
    )
