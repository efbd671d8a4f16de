"""The ranks of a job: joining a process group under torchrun, or starting one here, and saying why that fails."""

import os
import pickle
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from cs336_basics.machine import check_driver

Backend = Literal["auto", "nccl", "gloo"]
T = TypeVar("T")


@dataclass(frozen=True)
class Rank:
    """One process of a job, with a device of its own."""

    rank: int
    """Its number: 0, 1, … world_size - 1."""
    world_size: int
    """Number of processes."""
    device: torch.device
    """Device that the process computes on."""


def under_torchrun() -> bool:
    """Return whether torchrun has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ or {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()


def check_gpus(processes: int, device: str) -> None:
    """Raise a ValueError if the device is a GPU and there are fewer GPUs than processes."""
    on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if on_gpu and processes > torch.cuda.device_count():
        raise ValueError(
            f"--processes is {processes}, and each needs a GPU, but torch sees {torch.cuda.device_count()}; lower "
            "--processes, or choose --device cpu"
        )


@contextmanager
def process_group(backend: Backend = "auto", device: str = "auto", timeout_s: float = 600.0) -> Iterator[Rank]:
    """Join the process group that torchrun has started, and leave it at the end.

    Args:
        backend: nccl for GPUs; gloo for CPUs, and for GPUs through host memory; auto for the usual one of the device.
        device: cuda is the GPU of this rank; cpu; auto for a GPU if there is one.
        timeout_s: how long to wait for other ranks, at the start and in every collective.

    Raises:
        ValueError: torchrun has not started this process, or there is no such backend or device.
        ConnectionError: the other ranks do not join.
    """
    if not under_torchrun():
        raise ValueError(
            "this strategy needs several ranks; start it with torchrun --nproc-per-node 2 -m cs336_systems …"
        )
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    this = Rank(rank, world_size, device_of_rank(device, local_rank, backend))
    with _group(this, backend, "env://", timeout_s):
        yield this


def device_of_rank(name: str, local_rank: int, backend: Backend = "auto") -> torch.device:
    """Choose the device of the rank with this number on its machine.

    With NCCL, which refuses to share a GPU, each rank has a GPU of its own. With gloo several ranks may share one.
    """
    if name in ("auto", "cuda"):
        check_driver(torch.version.cuda)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if name != "cuda":
        raise ValueError(f"device {name!r} does not work with several ranks; choose auto, cuda or cpu")
    gpus = torch.cuda.device_count()
    if backend == "gloo" and gpus:
        return torch.device("cuda", local_rank % gpus)
    if local_rank >= gpus:
        raise ValueError(
            f"rank {local_rank} of this machine has no GPU: torch sees {gpus}; lower --nproc-per-node, let ranks "
            "share a GPU with --backend gloo, or choose --device cpu"
        )
    return torch.device("cuda", local_rank)


def run_on_ranks(
    function: Callable[..., T],
    world_size: int,
    *args: Any,
    backend: Backend = "auto",
    device: str = "cpu",
    timeout_s: float = 600.0,
    start_method: str = "spawn",
) -> list[T]:
    """Call `function(rank, *args)` in new processes of this machine that form a group; return the results by rank.

    Args:
        function, args: must be picklable.
        timeout_s: for everything together; ranks that have not finished by then are killed.

    Raises:
        TimeoutError: the ranks did not finish in time.
        torch.multiprocessing.ProcessRaisedException: a rank failed; the message holds the first one's traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = mp.start_processes(
            _run_process, (world_size, function, args, backend, device, timeout_s, folder), world_size,
            join=False, start_method=start_method,
        )  # fmt: skip
        assert context is not None
        deadline = time.monotonic() + timeout_s
        try:
            while not context.join(timeout=min(1.0, timeout_s)):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{world_size} ranks of {function.__name__} took more than {timeout_s:g} s")
        except mp.ProcessRaisedException as error:
            failure = Path(folder) / "failure"
            message = failure.read_text() if failure.exists() else error.msg
            raise mp.ProcessRaisedException(message, error.error_index, error.error_pid) from None
        finally:
            for process in context.processes:
                if process.is_alive():
                    process.kill()
        return [pickle.loads((Path(folder) / f"{rank}.pickle").read_bytes()) for rank in range(world_size)]


def _run_process(
    rank: int,
    world_size: int,
    function: Callable[..., object],
    args: tuple[Any, ...],
    backend: Backend,
    device: str,
    timeout_s: float,
    folder: str,
) -> None:
    this = Rank(rank, world_size, device_of_rank(device, rank, backend))
    with _group(this, backend, f"file://{folder}/rendezvous", timeout_s):
        try:
            result = function(this, *args)
            dist.barrier()
        except Exception:
            # The others are about to fail as well, since they lose this rank. Which of them ends first is chance.
            with suppress(FileExistsError), (Path(folder) / "failure").open("x") as file:
                file.write(f"rank {rank} of {world_size}: {traceback.format_exc()}")
            raise
    (Path(folder) / f"{rank}.pickle").write_bytes(pickle.dumps(result))


@contextmanager
def _group(this: Rank, backend: Backend, where: str, timeout_s: float) -> Iterator[None]:
    if backend == "auto":
        backend = "nccl" if this.device.type == "cuda" else "gloo"
    if backend == "nccl" and not dist.is_nccl_available():
        raise ValueError("this PyTorch was built without NCCL; choose --backend gloo")
    if backend == "nccl" and this.device.type != "cuda":
        raise ValueError("NCCL connects GPUs, but the device is cpu; choose --backend gloo")
    if this.device.type == "cuda":
        torch.cuda.set_device(this.device)
    try:
        timeout = timedelta(seconds=timeout_s)
        store, *_ = next(dist.rendezvous(where, this.rank, this.world_size, timeout=timeout))
        # torchrun keeps its store across restarts, and it may still hold addresses of processes that are gone.
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group(
            backend, timeout=timeout, store=store, rank=this.rank, world_size=this.world_size,
            device_id=this.device if backend == "nccl" else None,
        )  # fmt: skip
        dist.barrier()
    except (dist.DistError, RuntimeError) as error:
        raise ConnectionError(_why_not_joined(error, this, timeout_s)) from error
    try:
        yield
    except (dist.DistError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError) or not _is_lost_connection(error):
            raise
        raise ConnectionError(
            f"rank {this.rank} has lost the others ({_first_line(error)}): one of them has failed, or is slower than "
            f"{timeout_s:g} s; run the same command again to continue from the last checkpoint"
        ) from error
    finally:
        # After a failure the other ranks may be gone, and NCCL would wait for them.
        if backend != "nccl" or sys.exc_info()[0] is None:
            dist.destroy_process_group()


def _is_lost_connection(error: Exception) -> bool:
    texts = ("Connection closed", "Connection reset", "Connection refused", "Broken pipe", "imed out")
    return isinstance(error, dist.DistError) or any(text in str(error) for text in texts)


def _first_line(error: Exception) -> str:
    """Return an error's first sentence, without the place in the source that gloo's errors begin with."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return re.sub(r"\[/\S*\.cc:\d+\] ", "", line).split(". ")[0]


def _why_not_joined(error: Exception, this: Rank, timeout_s: float) -> str:
    address = f"{os.environ.get('MASTER_ADDR', 'localhost')}:{os.environ.get('MASTER_PORT', '')}"
    if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
        return f"port {address} is in use: start torchrun with another --master-port, or with --standalone"
    return (
        f"rank {this.rank} of {this.world_size} could not join the others at {address} within {timeout_s:g} s "
        f"({_first_line(error)}); check that all ranks are started and can reach that address"
    )
