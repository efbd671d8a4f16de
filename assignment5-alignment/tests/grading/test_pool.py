"""Worker processes: order, limits, deaths of children and parents."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from cs336_alignment.grading.equality import answers_equal
from cs336_alignment.grading.fork_server import FORK_SERVER
from cs336_alignment.grading.pool import WorkerPool
from cs336_alignment.rollouts.rewards import r1_zero_reward_fn

ROOT = Path(__file__).parents[2]
PAIR = ("x", "y")


@pytest.fixture
def pool_of():
    """Makes pools for functions of `tests.grading.functions`."""
    pools = []

    def make(function: str, size: int = 1) -> WorkerPool:
        pools.append(WorkerPool(f"tests.grading.functions:{function}", size))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


def wait_until(condition, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def test_results_come_in_the_order_of_the_calls(pool_of):
    durations = ["0.3", "0", "0.1", "0", "0.2", "0"]
    results = pool_of("sleep", size=3).map([(duration, str(i)) for i, duration in enumerate(durations)], 10)
    assert results == list("012345")
    assert pool_of("echo").map([], 1) == []


def test_any_text_arrives_as_it_was_sent(pool_of):
    texts = ["\ud800 \udfff", "\0\n\r\u2028", "é√", "{" * 300_000, '"\\']
    assert pool_of("echo").map([(text, text[::-1]) for text in texts], 10) == [[text, text[::-1]] for text in texts]


def test_workers_are_used_again_and_know_sympy_but_not_torch(pool_of):
    pool = pool_of("process_id", size=2)
    first, second = pool.map([PAIR], 10), pool.map([PAIR], 10)
    assert first == second == pool.idle_pids
    loaded = pool_of("modules").map([("torch transformers numpy vllm sympy math_verify", "")], 10)
    assert loaded == [["sympy", "math_verify"]]


@pytest.mark.parametrize(("function", "response"), [("sleep", "60"), ("big_power", "7")])
def test_a_call_has_its_time_and_no_more(pool_of, function, response):
    pool = pool_of(function)
    FORK_SERVER.new_worker("tests.grading.functions:echo").close()  # that it may have to start is not what is timed
    started = time.monotonic()
    assert pool.map([(response, "")], 0.5) == [None]
    assert 0.5 <= time.monotonic() - started < 10
    assert pool.idle_pids == []


def test_the_others_are_not_lost_with_a_call_that_hangs(pool_of):
    pool = pool_of("sleep", size=2)
    assert pool.map([("60", "a"), ("0", "b"), ("60", "c"), ("0", "d")], 0.5) == [None, "b", None, "d"]


def test_a_killed_worker_is_replaced(pool_of, tmp_path):
    pool = pool_of("process_id")
    (before,) = pool.map([PAIR], 10)
    os.kill(before, signal.SIGKILL)
    wait_until(lambda: not psutil.pid_exists(before))
    (after,) = pool.map([PAIR], 10)
    assert after != before

    path = tmp_path / "pid"

    def kill() -> None:
        wait_until(path.exists)
        os.kill(int(path.read_text()), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    assert pool_of("hang_at_first").map([(str(path), "")], 60) == ["second attempt"]
    killer.join()


def test_a_killed_fork_server_is_replaced(pool_of):
    pool = pool_of("echo")
    FORK_SERVER.start()
    before = FORK_SERVER.pid
    os.kill(before, signal.SIGKILL)
    assert pool.map([PAIR], 10) == [list(PAIR)]
    assert FORK_SERVER.pid != before


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is limited where there is /proc")
def test_memory_is_limited(pool_of):
    pool = pool_of("fill_memory")
    assert pool.map([PAIR], 30) == [None]
    assert pool_of("echo").map([PAIR], 10) == [list(PAIR)]


def test_an_exception_of_the_function_is_shown(pool_of):
    pool = pool_of("fail")
    with pytest.raises(RuntimeError, match="no such answer: x"):
        pool.map([PAIR], 10)
    with pytest.raises(RuntimeError, match="has no attribute 'missing'"):
        pool_of("missing").map([PAIR], 10)


def test_threads_may_share_a_pool():
    verdicts = {}

    def compare(i: int) -> None:
        verdicts[i] = answers_equal(f"x + {i}", f"{i} + x"), answers_equal(f"x + {i}", f"{i + 1} + x")

    threads = [threading.Thread(target=compare, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verdicts == dict.fromkeys(range(8), (True, False))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_copy_of_the_process_has_workers_of_its_own(pool_of):
    pool = pool_of("process_id")
    ours = pool.map([PAIR], 10)
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        try:
            os.write(writer, f"{pool.map([PAIR], 10)[0]} {FORK_SERVER.pid} {answers_equal('1+x', 'x+1')}".encode())
            FORK_SERVER.stop()
        finally:
            os._exit(0)
    os.close(writer)
    theirs, fork_server, verdict = os.read(reader, 100).decode().split()
    os.close(reader)
    os.waitpid(child, 0)
    assert int(theirs) not in ours
    assert int(fork_server) != FORK_SERVER.pid
    assert verdict == "True"
    assert pool.map([PAIR], 10) == ours


def test_it_works_in_a_spawned_process():
    with multiprocessing.get_context("spawn").Pool(1) as processes:
        rewards = processes.apply(r1_zero_reward_fn, ("</think> <answer> 1 + x </answer>", "x + 1"))
    assert rewards == {"reward": 1.0, "format_reward": 1.0, "answer_reward": 1.0}


PROGRAM = """
import sys, threading, time
from cs336_alignment.grading.fork_server import FORK_SERVER
from cs336_alignment.grading.pool import WorkerPool

idle, busy = (WorkerPool(f"tests.grading.functions:{name}", 1) for name in ("process_id", "sleep"))
pids = idle.map([("", "")], 60)
busy.map([("0", "")], 60)
print(*pids, *busy.idle_pids, FORK_SERVER.pid, flush=True)
busy.map([("60", "")], 2)
"""


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT])
def test_no_process_outlives_its_parent(ending):
    parent = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with parent:
        assert parent.stdout is not None
        assert parent.stderr is not None
        pids = [int(word) for word in parent.stdout.readline().split()]
        assert len(pids) == 3
        time.sleep(0.2)  # until the second worker is at its job
        os.killpg(parent.pid, ending)  # as Ctrl-C in a terminal does
        errors = parent.stderr.read()
    assert parent.returncode == -ending
    wait_until(lambda: not any(map(psutil.pid_exists, pids)))  # the busy one: when its call's limit is over
    if ending == signal.SIGINT:
        assert errors.count("Traceback") == 1
        assert errors.rstrip().endswith("KeyboardInterrupt")
    else:
        assert errors == ""
