"""Calls of a function `(response, truth) -> result` in worker processes, each with a hard time limit."""

import os
import selectors
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from cs336_alignment.grading.fork_server import FORK_SERVER, Worker

_GRACE_S = 1.0
"""A worker ends itself at its time limit. If it has not ended after this much longer, it is abandoned."""
_ATTEMPTS = 2


@dataclass
class _Job:
    index: int
    limit: float
    attempts: int = 0
    started: float = 0.0

    def begin(self) -> None:
        self.attempts, self.started = self.attempts + 1, time.monotonic()

    def is_late(self, grace: float = 0.0) -> bool:
        return time.monotonic() >= self.started + self.limit + grace


class WorkerPool:
    """Up to `size` workers, which are started when they are needed and replaced when they die.

    Any thread may call `map`; the calls take turns. After a fork, the copy of this process starts its own workers.

    Args:
        function: `module:name` of a function of two strings, whose result can be written as JSON.
        size: maximum number of workers.
    """

    def __init__(self, function: str, size: int) -> None:
        self.function = function
        self.size = size
        self._lock = threading.Lock()
        self._idle: list[Worker] = []
        _POOLS.add(self)

    @property
    def idle_pids(self) -> list[int]:
        """Process ids of the workers that are waiting for a call."""
        return [worker.pid for worker in self._idle]

    def map(self, pairs: Sequence[tuple[str, str]], seconds: float) -> list[Any]:
        """Compute the function for each pair, in order; None for a call that took too long or killed its worker.

        If a worker dies before the time limit (at its memory limit, in a crash, by a signal from outside), the call is
        repeated once by another worker.

        Args:
            seconds: time limit of each call.

        Raises:
            RuntimeError: the function raised an exception, or no worker can be started.
        """
        results: list[Any] = [None] * len(pairs)
        waiting = deque(_Job(index, seconds) for index in range(len(pairs)))
        busy: dict[Worker, _Job] = {}
        with self._lock:
            try:
                while waiting or busy:
                    while waiting and len(busy) < self.size:
                        job = waiting.popleft()
                        busy[self._give(pairs[job.index], seconds)] = job
                        job.begin()
                    for worker in _readable(busy, seconds + _GRACE_S):
                        try:
                            if outcome := worker.receive():
                                results[busy.pop(worker).index] = outcome["result"]
                                self._idle.append(worker)
                        except EOFError:
                            job = busy.pop(worker)
                            worker.close()
                            if not job.is_late() and job.attempts < _ATTEMPTS:
                                waiting.append(job)
                    for worker in [worker for worker, job in busy.items() if job.is_late(_GRACE_S)]:
                        del busy[worker]
                        worker.close()
            finally:  # after an exception, the results of these are no longer needed
                for worker in busy:
                    worker.close()
        return results

    def _give(self, pair: tuple[str, str], seconds: float) -> Worker:
        """Send a call to an idle worker or, if there is none, to a new one."""
        while True:
            worker = self._idle.pop() if self._idle else FORK_SERVER.new_worker(self.function)
            try:
                worker.send(*pair, seconds)
                return worker
            except OSError:  # it was killed while it was waiting
                worker.close()

    def close(self) -> None:
        """Let the workers end. Another call of `map` starts new ones."""
        with self._lock:
            while self._idle:
                self._idle.pop().close()

    def abandon(self) -> None:
        """Forget the workers, in a forked copy of this process, which does not own them."""
        for worker in self._idle:
            worker.connection.close()
        self._lock, self._idle = threading.Lock(), []


def _readable(workers: Iterable[Worker], seconds: float) -> list[Worker]:
    """Wait for a worker to answer or die, and return all that have. After this many seconds the list may be empty."""
    with selectors.DefaultSelector() as selector:
        for worker in workers:
            selector.register(worker.connection, selectors.EVENT_READ, worker)
        return [key.data for key, _ in selector.select(seconds)]


_POOLS: weakref.WeakSet[WorkerPool] = weakref.WeakSet()


def _abandon_all() -> None:
    for pool in list(_POOLS):
        pool.abandon()


os.register_at_fork(after_in_child=_abandon_all)
