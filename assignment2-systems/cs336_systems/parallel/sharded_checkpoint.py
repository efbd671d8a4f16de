"""Checkpoints that several ranks write, each its share, and any number of ranks can read.

A sharded checkpoint is a folder with one file per rank. A file holds pieces: consecutive elements of a tensor, under
the tensor's name. A reader asks for the elements that it needs, wherever they are. Assignment 1's checkpoints, a single
file with everything, are read in the same way, so that a run may continue under another strategy.

    model.<parameter>                   a parameter
    optimizer.<parameter>.<entry>       an entry of its optimizer state, for example a moment
"""

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cs336_basics.checkpoint import read_checkpoint
from cs336_systems.parallel.collectives import all_gather_objects
from cs336_systems.parallel.fsdp_unit import ShardRange
from cs336_systems.parallel.sharded_optimizer import ShardedOptimizer
from cs336_systems.parallel.torch_fsdp2 import local_part

FORMAT = 1


class Piece(NamedTuple):
    """Consecutive elements of a tensor."""

    shape: torch.Size
    """Shape of the full tensor."""
    start: int
    """Index of the first element in the flattened tensor."""
    values: Tensor
    """The elements, 1-D."""


def save_sharded(
    path: os.PathLike[str], module: nn.Module, optimizer: torch.optim.Optimizer, ranges: Mapping[str, ShardRange],
    **header: Any,
) -> None:  # fmt: skip
    """Write this rank's share of a checkpoint; all ranks call this. The folder appears only when it is complete.

    Args:
        path: the folder.
        module: the wrapped module, whose parameters are shards where `ranges` names them.
        optimizer: the optimizer of its parameters.
        ranges: see `FSDP.shard_ranges`; other parameters are full, and the same on every rank.
        header: numbers, strings and tensors to store as well.

    Raises:
        OSError: on every rank, if any of them cannot write.
    """
    path, rank = Path(path), dist.get_rank()
    unfinished = path.with_name(path.name + ".tmp")

    def write() -> None:
        pieces, values = _pieces(module, optimizer, ranges, everything=rank == 0)
        contents = {
            "format": FORMAT, "world_size": dist.get_world_size(), "header": header, "pieces": pieces, "values": values,
            "param_groups": _named_groups(module, optimizer),
        }  # fmt: skip
        with open(unfinished / f"process_{rank:05d}.pt", "wb") as file:
            torch.save(contents, file)
            file.flush()
            os.fsync(file.fileno())

    def begin() -> None:
        shutil.rmtree(unfinished, ignore_errors=True)  # left by a job that was killed while it wrote
        unfinished.mkdir(parents=True)

    def publish() -> None:
        if path.exists():
            shutil.rmtree(path)
        unfinished.replace(path)

    try:
        run_on_all_ranks(begin if rank == 0 else None)
        run_on_all_ranks(write)
        run_on_all_ranks(publish if rank == 0 else None)
    except OSError as error:
        raise OSError(
            f"cannot write checkpoint {path} ({error}); free some space or choose another folder, then run the same "
            "command again: earlier checkpoints are untouched"
        ) from error
    finally:
        if rank == 0:
            shutil.rmtree(unfinished, ignore_errors=True)


def run_on_all_ranks(action: Callable[[], None] | None) -> None:
    """Run an action on every rank (None: nothing to do on this one), and return when all ranks have finished.

    Raises:
        OSError: on every rank, if the action failed on one of them, so that no rank waits in vain.
    """
    problem = None
    try:
        if action is not None:
            action()
    except torch.OutOfMemoryError:
        raise
    except (OSError, RuntimeError) as error:  # torch reports a failed write as a RuntimeError
        problem = str(error if isinstance(error, OSError) else error.__context__ or error)
    if reason := next((other for other in all_gather_objects(problem) if other), None):
        raise OSError(reason)


class Checkpoint:
    """A checkpoint opened for reading: a folder of shares, or Assignment 1's single file.

    The tensors of a folder are mapped into memory: only the requested elements are read.

    Args:
        path: the file or folder.
        names: names of the model's parameters in the optimizer's order, by which a single file numbers them.

    Attributes:
        header: everything that was saved besides model and optimizer, including the iteration.
        param_groups: the optimizer's options, with the "names" of the parameters instead of numbers.

    Raises:
        FileNotFoundError: the checkpoint does not exist.
        ValueError: the checkpoint is damaged.
    """

    def __init__(self, path: os.PathLike[str], names: list[str]) -> None:
        self.path = Path(path)
        self._pieces: dict[str, list[Piece]] = {}
        self._values: dict[str, Any] = {}
        self.header: dict[str, Any]
        self.param_groups: list[dict[str, Any]]
        if self.path.is_dir():
            self._open_folder()
        else:
            self._open_file(names)

    def _open_folder(self) -> None:
        files = sorted(self.path.glob("process_*.pt"))
        try:
            shares = [torch.load(file, map_location="cpu", weights_only=True, mmap=True) for file in files]
            world_size = shares[0]["world_size"]
            if len(shares) != world_size:
                raise ValueError(f"only {len(shares)} of {world_size} files exist")
            for share in shares:
                self._values |= share["values"]
                for name, (shape, start, values) in share["pieces"].items():
                    self._pieces.setdefault(name, []).append(Piece(torch.Size(shape), start, values))
            self.header, self.param_groups = shares[0]["header"], shares[0]["param_groups"]
        except Exception as error:  # torch raises many kinds for damaged files
            raise _damaged(self.path, error) from error

    def _open_file(self, names: list[str]) -> None:
        state = read_checkpoint(self.path)
        optimizer = state.pop("optimizer")
        tensors = {f"model.{name}": tensor for name, tensor in state.pop("model").items()}
        for number, entries in optimizer["state"].items():
            for entry, value in entries.items():
                key = f"optimizer.{names[number]}.{entry}"
                (tensors if isinstance(value, Tensor) else self._values)[key] = value
        self._pieces = {key: [Piece(tensor.shape, 0, tensor.reshape(-1))] for key, tensor in tensors.items()}
        self.header = state
        self.param_groups = [
            {**group, "params": None, "names": [names[number] for number in group["params"]]}
            for group in optimizer["param_groups"]
        ]

    def tensor(self, key: str, range_: ShardRange | None = None) -> Tensor:
        """Return a full tensor, or the elements of a range as a 1-D tensor."""
        pieces = self._pieces.get(key)
        if not pieces:
            raise _damaged(self.path, f"it lacks {key}")
        shape = pieces[0].shape
        start, stop = (range_.start, range_.stop) if range_ else (0, shape.numel())
        result = pieces[0].values.new_empty(stop - start)
        covered = 0
        for piece in pieces:
            low, high = max(start, piece.start), min(stop, piece.start + piece.values.numel())
            if low < high:
                result[low - start : high - start] = piece.values[low - piece.start : high - piece.start]
                covered += high - low
        if covered < stop - start:
            raise _damaged(self.path, f"it holds {covered} of {stop - start} elements of {key}")
        return result if range_ else result.view(shape)

    def load_model(self, module: nn.Module, ranges: Mapping[str, ShardRange]) -> None:
        """Fill the parameters of a module, which are shards where `ranges` names them.

        Raises:
            ValueError: the checkpoint belongs to another model.
        """
        for name, target in module.state_dict(keep_vars=True).items():
            key = f"model.{name}"
            shape = ranges[name].shape if name in ranges else target.shape
            saved = self._pieces.get(key)
            if not saved or saved[0].shape != shape:
                what = f"has shape {tuple(saved[0].shape)}" if saved else "is missing"
                raise ValueError(
                    f"checkpoint {self.path} does not fit this model: {name} {what} there, but must have shape "
                    f"{tuple(shape)}; choose a checkpoint of the same model"
                )
            _fill(target, self.tensor(key, ranges.get(name)))

    def load_optimizer(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, ranges: Mapping[str, ShardRange]
    ) -> None:
        """Give an optimizer its options and the state of the parameters that it holds."""
        inner = optimizer.inner if isinstance(optimizer, ShardedOptimizer) else optimizer
        saved = {name: group for group in self.param_groups for name in group["names"]}
        names = {parameter: name for name, parameter in module.named_parameters()}
        state_dict = inner.state_dict()
        parameters = [parameter for group in inner.param_groups for parameter in group["params"]]
        state_dict["state"] = {
            number: entries for number, parameter in enumerate(parameters)
            if (entries := self._entries(parameter, names[parameter], ranges.get(names[parameter])))
        }  # fmt: skip
        inner.load_state_dict(state_dict)
        for group in optimizer.param_groups:
            group.update(_options(saved[names[group["params"][0]]]))

    def _entries(self, parameter: Tensor, name: str, range_: ShardRange | None) -> dict[str, Any]:
        """Read the optimizer state of a parameter; entries of the parameter's shape are sharded as it is."""
        prefix = f"optimizer.{name}."
        entries = {key.removeprefix(prefix): value for key, value in self._values.items() if key.startswith(prefix)}
        for key, pieces in self._pieces.items():
            if key.startswith(prefix):
                if range_ is not None and pieces[0].shape == range_.shape:
                    entry = torch.empty_like(parameter)
                    _fill(entry, self.tensor(key, range_))
                else:
                    entry = self.tensor(key)
                entries[key.removeprefix(prefix)] = entry
        return entries


def _pieces(
    module: nn.Module, optimizer: torch.optim.Optimizer, ranges: Mapping[str, ShardRange], everything: bool
) -> tuple[dict[str, tuple[list[int], int, Tensor]], dict[str, Any]]:
    """Collect what this rank writes: shards, its share of a sharded optimizer, and, with `everything`, the rest."""
    pieces: dict[str, tuple[list[int], int, Tensor]] = {}
    values: dict[str, Any] = {}

    def add(key: str, tensor: Tensor, range_: ShardRange | None) -> None:
        shape, start = (range_.shape, range_.start) if range_ else (tensor.shape, 0)
        pieces[key] = (list(shape), start, local_part(tensor).reshape(-1).to("cpu", copy=True))

    for name, tensor in module.state_dict().items():
        if name in ranges or everything:
            add(f"model.{name}", tensor, ranges.get(name))
    own = isinstance(optimizer, ShardedOptimizer)
    inner = optimizer.inner if isinstance(optimizer, ShardedOptimizer) else optimizer
    names: dict[Tensor, str] = {parameter: name for name, parameter in module.named_parameters()}
    for parameter, entries in inner.state.items():
        name = names[parameter]
        for entry, value in entries.items():
            key = f"optimizer.{name}.{entry}"
            sharded = name in ranges and isinstance(value, Tensor) and value.shape == parameter.shape
            if not (sharded or own or everything):
                continue
            if isinstance(value, Tensor):
                add(key, value, ranges[name] if sharded else None)
            else:
                values[key] = value
    return pieces, values


def _fill(target: Tensor, values: Tensor) -> None:
    local = local_part(target)
    local.copy_(values.view(local.shape))


def _named_groups(module: nn.Module, optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    names = {parameter: name for name, parameter in module.named_parameters()}
    return [_options(group) | {"names": [names[p] for p in group["params"]]} for group in optimizer.param_groups]


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name not in ("params", "names")}


def _damaged(path: Path, reason: object) -> ValueError:
    first_line = (str(reason) or type(reason).__name__).splitlines()[0]
    return ValueError(f"checkpoint {path} is damaged ({first_line}); delete it to continue from the one before it")
