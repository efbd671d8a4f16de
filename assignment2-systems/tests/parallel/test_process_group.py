"""Processes find one another, or say why not, in bounded time."""

import os
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing import ProcessRaisedException

from cs336_systems.parallel.process_group import Rank, device_of_rank, process_group, run_on_ranks, under_torchrun
from tests.workers import START_METHOD


@contextmanager
def free_port():
    """A port of this machine, taken until the end."""
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        yield taken.getsockname()[1]


@pytest.fixture
def torchrun(monkeypatch):
    """What torchrun would set for one of its processes."""
    for name in ("TORCHELASTIC_RUN_ID", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with free_port() as port:
        pass

    def set_environment(rank=0, world_size=1, port=port):
        settings = {"RANK": rank, "WORLD_SIZE": world_size, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        for name, value in settings.items():
            monkeypatch.setenv(name, str(value))

    return set_environment


@pytest.fixture
def no_torchrun(monkeypatch):
    for name in ("TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


def test_one_process_joins_itself_and_leaves(torchrun):
    torchrun()
    with process_group("auto", "cpu") as rank:
        assert rank == Rank(0, 1, torch.device("cpu"))
        assert dist.get_backend() == "gloo"
        assert dist.get_world_size() == 1
    assert not dist.is_initialized()


def test_leaves_after_an_error(torchrun):
    torchrun()
    with pytest.raises(KeyError, match="oops"), process_group("gloo", "cpu"):
        raise KeyError("oops")
    assert not dist.is_initialized()


@pytest.mark.usefixtures("no_torchrun")
def test_not_under_torchrun():
    assert not under_torchrun()
    with pytest.raises(ValueError, match="torchrun --nproc-per-node"), process_group():
        pass


@pytest.mark.parametrize(
    ("backend", "device", "message"),
    [("nccl", "cpu", "choose --backend gloo"), ("auto", "tpu", "choose auto, cuda or cpu")],
)
def test_no_such_backend_or_device(torchrun, backend, device, message):
    torchrun()
    with pytest.raises(ValueError, match=message), process_group(backend, device):
        pass
    assert not dist.is_initialized()


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_no_gpu(torchrun):
    torchrun()
    assert device_of_rank("auto", 3) == torch.device("cpu")
    with pytest.raises(ValueError, match="torch sees 0"), process_group("nccl", "cuda"):
        pass


@pytest.mark.parametrize("rank", [0, 1])
def test_the_others_do_not_come(torchrun, rank):
    torchrun(rank=rank, world_size=2)
    start = time.monotonic()
    with (
        pytest.raises(ConnectionError, match=rf"rank {rank} of 2 could not join .* within 1 s"),
        process_group("gloo", "cpu", timeout_s=1),
    ):
        pass
    assert time.monotonic() - start < 20
    assert not dist.is_initialized()


def test_the_port_is_in_use(torchrun):
    with free_port() as port:
        torchrun(world_size=2, port=port)
        with (
            pytest.raises(ConnectionError, match=rf"localhost:{port} is in use: .* --master-port"),
            process_group("gloo", "cpu", timeout_s=5),
        ):
            pass


def fail_in_one(process):
    if process.rank == 1:
        raise KeyError("oops")
    dist.barrier()


def lose_one_another(process, port):
    """Rank 1 fails, so that rank 0 waits in vain."""
    dist.destroy_process_group()
    rank, world_size = process.rank, process.world_size
    settings = {"RANK": rank, "WORLD_SIZE": world_size, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in settings.items()})
    exception, message = (KeyError, "oops") if rank == 1 else (ConnectionError, "rank 0 has lost the others")
    try:
        with pytest.raises(exception, match=message), process_group("gloo", "cpu", timeout_s=10):
            fail_in_one(process)
    finally:
        for name in settings:
            del os.environ[name]


def test_another_process_fails(workers):
    with free_port() as port:
        pass
    workers.run(lose_one_another, 2, port)


def sum_of_ranks(process, factor):
    total = torch.tensor(process.rank)
    dist.all_reduce(total)
    return process.rank, total * factor


def sleep(process):
    time.sleep(60)


@pytest.mark.usefixtures("workers")  # for what they have set for new processes: that they need not import torch
class TestRunProcesses:
    def test_results_are_in_order(self):
        results = run_on_ranks(sum_of_ranks, 3, 10, timeout_s=60, start_method=START_METHOD)
        assert results == [(0, torch.tensor(30)), (1, torch.tensor(30)), (2, torch.tensor(30))]

    def test_a_failure_comes_with_its_traceback(self):
        with pytest.raises(ProcessRaisedException, match=r"(?s)rank 1 of 2: .*fail_in_one.*oops"):
            run_on_ranks(fail_in_one, 2, timeout_s=60, start_method=START_METHOD)

    def test_what_takes_too_long_is_ended(self):
        start = time.monotonic()
        with pytest.raises(TimeoutError, match="2 ranks of sleep took more than 2 s"):
            run_on_ranks(sleep, 2, timeout_s=2, start_method=START_METHOD)
        assert time.monotonic() - start < 20


PROGRAM = """
import sys
from pathlib import Path
import torch
import torch.distributed as dist
import cs336_systems.parallel

def threads():
    return len(list(Path("/proc/self/task").iterdir()))

dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
weight = torch.nn.Parameter(torch.ones(1))
weight.grad = torch.ones(1)
torch.optim.SGD([weight]).step()  # imports much of torch
before = threads()
dist.destroy_process_group()
assert threads() < before, before
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="this system does not list the threads of a process")
def test_a_group_that_is_destroyed_leaves_no_thread(tmp_path):
    subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path / "rendezvous")], check=True)
