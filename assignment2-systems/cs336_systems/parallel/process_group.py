"""Joining the processes of a job, under torchrun or started from here, and saying clearly why that fails."""

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
class Process:
    """One process of a job."""

    rank: int
    """Its number: 0, 1, … world_size - 1."""
    world_size: int
    """How many there are."""
    device: torch.device
    """Where it computes."""


def under_torchrun() -> bool:
    """Whether torchrun has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ or {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()


def check_gpus(processes: int, device: str) -> None:
    """Raise a ValueError if on this device, cuda say, so many processes cannot each have a GPU of its own."""
    on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if on_gpu and processes > torch.cuda.device_count():
        raise ValueError(
            f"--processes is {processes}, and each needs a GPU, but torch sees {torch.cuda.device_count()}; lower "
            "it, or choose --device cpu"
        )


@contextmanager
def joined(backend: Backend = "auto", device: str = "auto", timeout_s: float = 600.0) -> Iterator[Process]:
    """Join the processes that torchrun has started, and leave them at the end.

    Args:
        backend: nccl for GPUs; gloo for CPUs, and for GPUs through host memory; auto for the usual one of the device.
        device: cuda is the GPU of this process; cpu; auto for a GPU if there is one.
        timeout_s: how long to wait for other processes, at the start and in every collective.

    Raises:
        ValueError: torchrun has not started this process, or there is no such backend or device.
        ConnectionError: the others do not come.
    """
    if not under_torchrun():
        raise ValueError(
            "this needs to be started in several processes: torchrun --nproc-per-node 2 -m cs336_systems …"
        )
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    process = Process(rank, world_size, device_of_process(device, local_rank, backend))
    with _group(process, backend, "env://", timeout_s):
        yield process


def device_of_process(name: str, local_rank: int, backend: Backend = "auto") -> torch.device:
    """The device of the process that is number `local_rank` on its machine.

    With NCCL, which refuses to share one, each process has a GPU of its own. With gloo several may have the same.
    """
    if name in ("auto", "cuda"):
        check_driver(torch.version.cuda)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if name != "cuda":
        raise ValueError(f"device {name!r} is none for several processes; choose auto, cuda or cpu")
    gpus = torch.cuda.device_count()
    if backend == "gloo" and gpus:
        return torch.device("cuda", local_rank % gpus)
    if local_rank >= gpus:
        raise ValueError(
            f"process {local_rank} of this machine has no GPU: torch sees {gpus}; lower --nproc-per-node, let "
            "processes share a GPU with --backend gloo, or choose --device cpu"
        )
    return torch.device("cuda", local_rank)


def run_processes(
    function: Callable[..., T],
    world_size: int,
    *args: Any,
    backend: Backend = "auto",
    device: str = "cpu",
    timeout_s: float = 600.0,
    start_method: str = "spawn",
) -> list[T]:
    """Call `function(process, *args)` in new processes of this machine that form a group; their results in order.

    Args:
        function, args: what can be pickled.
        timeout_s: for everything together; processes that are not done by then are ended.

    Raises:
        TimeoutError: they were not done in time.
        torch.multiprocessing.ProcessRaisedException: one of them failed; the message holds the first one's traceback.
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
                    raise TimeoutError(f"{world_size} processes of {function.__name__} took more than {timeout_s:g} s")
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
    process = Process(rank, world_size, device_of_process(device, rank, backend))
    with _group(process, backend, f"file://{folder}/rendezvous", timeout_s):
        try:
            result = function(process, *args)
            dist.barrier()
        except Exception:
            # The others are about to fail as well, since they lose this process. Which of them ends first is chance.
            with suppress(FileExistsError), (Path(folder) / "failure").open("x") as file:
                file.write(f"process {rank} of {world_size}: {traceback.format_exc()}")
            raise
    (Path(folder) / f"{rank}.pickle").write_bytes(pickle.dumps(result))


@contextmanager
def _group(process: Process, backend: Backend, where: str, timeout_s: float) -> Iterator[None]:
    if backend == "auto":
        backend = "nccl" if process.device.type == "cuda" else "gloo"
    if backend == "nccl" and not dist.is_nccl_available():
        raise ValueError("this PyTorch was built without NCCL; choose --backend gloo")
    if backend == "nccl" and process.device.type != "cuda":
        raise ValueError("NCCL connects GPUs, but the device is cpu; choose --backend gloo")
    if process.device.type == "cuda":
        torch.cuda.set_device(process.device)
    try:
        timeout = timedelta(seconds=timeout_s)
        store, *_ = next(dist.rendezvous(where, process.rank, process.world_size, timeout=timeout))
        # torchrun keeps its store over restarts, in which addresses of processes that are gone may still be found.
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group(
            backend, timeout=timeout, store=store, rank=process.rank, world_size=process.world_size,
            device_id=process.device if backend == "nccl" else None,
        )  # fmt: skip
        dist.barrier()
    except (dist.DistError, RuntimeError) as error:
        raise ConnectionError(_why(error, process, timeout_s)) from error
    try:
        yield
    except (dist.DistError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError) or not _is_lost_connection(error):
            raise
        raise ConnectionError(
            f"process {process.rank} has lost the others ({_first_line(error)}); one of them has failed or is "
            f"slower than {timeout_s:g} s. The same command goes on from the last checkpoint"
        ) from error
    finally:
        # After a failure the others may be gone, and NCCL would wait for them.
        if backend != "nccl" or sys.exc_info()[0] is None:
            dist.destroy_process_group()


def _is_lost_connection(error: Exception) -> bool:
    texts = ("Connection closed", "Connection reset", "Connection refused", "Broken pipe", "imed out")
    return isinstance(error, dist.DistError) or any(text in str(error) for text in texts)


def _first_line(error: Exception) -> str:
    """What an error says first, without the place in the source that gloo's begin with and the advice that follows."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return re.sub(r"\[/\S*\.cc:\d+\] ", "", line).split(". ")[0]


def _why(error: Exception, process: Process, timeout_s: float) -> str:
    address = f"{os.environ.get('MASTER_ADDR', 'localhost')}:{os.environ.get('MASTER_PORT', '')}"
    if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
        return f"port {address} is in use: start torchrun with another --master-port, or with --standalone"
    return (
        f"process {process.rank} of {process.world_size} could not join the others at {address} within {timeout_s:g} s "
        f"({_first_line(error)}); are all of them started, and do they reach that address?"
    )
