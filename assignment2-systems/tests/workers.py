"""Processes for the tests of what runs in several: started once a session, since importing torch takes seconds."""

import multiprocessing
import pickle
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

from tests import conftest  # noqa: F401  It has annotations checked, and must come before what is to be checked.

# isort: split
from cs336_systems.parallel import collectives
from cs336_systems.parallel.process_group import Rank

#: What takes long to import, and has no annotations to check. The processes are copies of one that has done it.
PRELOADED = ["torch", "torch.distributed", "torch._dynamo", "beartype", "pytest", "cs336_basics.model"]
START_METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
COLLECTIVE_TIMEOUT_S = 20.0


class Workers:
    """A few processes, of which each task makes a new group that talks through gloo."""

    def __init__(self, count: int = 3) -> None:
        self._count = count
        self._context = multiprocessing.get_context(START_METHOD)
        if START_METHOD == "forkserver":
            self._context.set_forkserver_preload(PRELOADED)
        self._folder = tempfile.TemporaryDirectory()
        self._tasks = 0
        self._processes: list[multiprocessing.process.BaseProcess] = []
        self._pipes: list[multiprocessing.connection.Connection] = []

    def run(self, function: Callable, world_size: int, *args: object, timeout_s: float = 60.0) -> list:
        """Call `function(process, *args)` in `world_size` processes; their results in order.

        A failure in any of them fails here, with all tracebacks. What hangs is ended, and the processes with it.
        """
        if not self._processes:
            self._start()
        self._tasks += 1
        for rank, pipe in enumerate(self._pipes[:world_size]):
            rendezvous = str(Path(self._folder.name) / str(self._tasks))
            process = Rank(rank, world_size, torch.device("cpu"))
            pipe.send_bytes(pickle.dumps((process, rendezvous, function, args)))
        deadline = time.monotonic() + timeout_s
        answers = []
        for rank, pipe in enumerate(self._pipes[:world_size]):
            try:
                if not pipe.poll(max(0.0, deadline - time.monotonic())):
                    raise TimeoutError(f"process {rank} of {function.__name__} takes more than {timeout_s:g} s")
                answers.append(pickle.loads(pipe.recv_bytes()))
            except (TimeoutError, EOFError, ConnectionError):
                self.stop()
                raise
        errors = [f"process {rank}: {error}" for rank, (error, _) in enumerate(answers) if error]
        if errors:
            raise AssertionError("\n".join(errors))
        return [result for _, result in answers]

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._pipes = [], []

    def _start(self) -> None:
        for _ in range(self._count):
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)


def _serve(pipe: multiprocessing.connection.Connection) -> None:
    while True:
        try:
            task = pipe.recv_bytes()
        except EOFError:
            return
        try:
            answer = pickle.dumps(("", _run(*pickle.loads(task))))
        except BaseException:
            answer = pickle.dumps((traceback.format_exc(), None))
        pipe.send_bytes(answer)


def _run(process: Rank, rendezvous: str, function: Callable, args: tuple) -> object:
    torch.manual_seed(0)
    store = dist.FileStore(rendezvous, process.world_size)
    timeout = timedelta(seconds=COLLECTIVE_TIMEOUT_S)
    dist.init_process_group("gloo", store=store, timeout=timeout, rank=process.rank, world_size=process.world_size)
    dist.barrier()  # a process that is done at once must not leave while others still connect to it
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", "Conversion of an array with ndim > 0")  # Triton 3.6's interpreter
            return function(process, *args)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()  # after a failure: so that the others fail as well, rather than wait


@contextmanager
def recorded_collectives() -> Iterator[list[tuple[str, torch.dtype, int]]]:
    """The name, dtype and input elements of every collective that starts in here, as they start."""
    calls: list[tuple[str, torch.dtype, int]] = []

    def recorded(name: str, function: Callable, position: int) -> Callable:
        def call(*args: object, **kwargs: object) -> object:
            sent = args[position] if isinstance(args[position], list) else [args[position]]
            calls.append((name, sent[0].dtype, sum(tensor.numel() for tensor in sent)))
            return function(*args, **kwargs)

        return call

    with ExitStack() as stack:
        for owner, name, position in (
            (dist, "broadcast", 0),
            (collectives, "_all_reduce", 0),
            (collectives, "_all_gather", 1),
            (collectives, "_reduce_scatter", 1),
        ):
            call = recorded(name.removeprefix("_"), getattr(owner, name), position)
            stack.enter_context(mock.patch.object(owner, name, call))
        yield calls
