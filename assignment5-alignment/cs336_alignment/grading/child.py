"""The processes behind a `WorkerPool`: a fork server, which has imported sympy, and the workers that it forks.

Importing sympy takes seconds, but forking a process that has imported it takes milliseconds, so a worker that was
killed is replaced at once. The fork server is a fresh Python process without torch and without threads, which makes
forking safe. No process outlives its parent: it notices that its socket has closed, or that its parent has changed.

This module is the children's side; `fork_server` is the parent's.
"""

import importlib
import json
import os
import resource
import select
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

MEMORY_LIMIT = 1 << 30
"""Bytes that a worker process may use beyond what it starts with, on systems with /proc. If it needs more, it dies."""

_PARENT_CHECK_S = 1.0


def serve(control: socket.socket) -> None:
    """Run the fork server: fork a worker for each message, which holds a function's name and one end of a socket."""
    parent = os.getppid()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps the workers
    importlib.import_module("cs336_alignment.grading.symbolic")
    silence = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):  # hostile answers make libraries warn
        os.dup2(silence, stream.fileno())
    while _wait_for(control, parent):
        message, handles, _, _ = socket.recv_fds(control, 4096, 1)
        if not message:
            return
        if os.fork() == 0:
            try:
                control.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                _work(socket.socket(fileno=handles[0]), message.decode())
            finally:  # also if nothing listens at the other end any more
                os._exit(0)
        os.close(handles[0])


def _work(jobs: socket.socket, name: str) -> None:
    """Run a worker: load a function, report that, then compute calls, each within its time limit.

    A call is a JSON line `[response, truth, seconds]`. Every reply is a JSON line, `{"result": ...}` or
    `{"error": ...}` with a traceback. The first reply comes once the function is loaded; its result is the process id.
    """
    parent = os.getppid()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)

    def reply(call: Callable[[], Any]) -> None:
        try:
            outcome = json.dumps({"result": call()})
        except MemoryError:
            os._exit(1)
        except Exception:
            outcome = json.dumps({"error": traceback.format_exc()})
        signal.setitimer(signal.ITIMER_REAL, 0)
        jobs.sendall(outcome.encode() + b"\n")

    def answer(line: bytes) -> Any:
        response, truth, seconds = json.loads(line)
        # The alarm's default action ends the process, whatever Python or C code is running.
        signal.setitimer(signal.ITIMER_REAL, seconds)
        return _named(name)(response, truth)

    def hello() -> int:
        _named(name)
        _limit_memory()
        return os.getpid()

    reply(hello)
    with jobs.makefile("rb") as lines:
        while _wait_for(jobs, parent) and (line := lines.readline()):
            reply(partial(answer, line))


def _named(name: str) -> Callable[[str, str], Any]:
    """Import the function that `module:name` refers to."""
    module, _, attributes = name.partition(":")
    found: Any = importlib.import_module(module)
    for attribute in attributes.split("."):
        found = getattr(found, attribute)
    return found


def _wait_for(connection: socket.socket, parent: int) -> bool:
    """Wait until there is something to read. Return False if the parent has died in the meantime.

    Another process that the parent has forked may hold a copy of the other end, so that end may stay open.
    """
    while os.getppid() == parent:
        if select.select([connection], [], [], _PARENT_CHECK_S)[0]:
            return True
    return False


def _limit_memory() -> None:
    statistics = Path("/proc/self/statm")
    if statistics.exists():
        limit = int(statistics.read_text().split()[0]) * resource.getpagesize() + MEMORY_LIMIT
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
