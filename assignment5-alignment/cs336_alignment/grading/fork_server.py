"""Starting worker processes; `worker` says what they are."""

import atexit
import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from typing import Any

_PROGRAM = """\
import json, socket, sys
sys.path[:] = json.loads(sys.argv[2])
from cs336_alignment.grading.worker import serve
serve(socket.socket(fileno=int(sys.argv[1])))
"""
_START_LIMIT_S = 120.0
_SEND_LIMIT_S = 10.0


class Worker:
    """A process that computes `function(response, truth)`, one job at a time.

    Raises:
        EOFError: there is no such process at the other end of the connection.
        RuntimeError: it cannot import the function.
    """

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._received = b""
        connection.settimeout(_START_LIMIT_S)
        while (hello := self.receive()) is None:
            pass
        self.pid: int = hello["result"]
        connection.settimeout(_SEND_LIMIT_S)

    def send(self, response: str, truth: str, seconds: float) -> None:
        """Give it a job.

        Raises:
            OSError: it is dead.
        """
        self.connection.sendall(json.dumps([response, truth, seconds]).encode() + b"\n")

    def receive(self) -> dict[str, Any] | None:
        """Read what has arrived: the job's result under "result", or None as long as it is not complete.

        Raises:
            EOFError: it is dead.
            RuntimeError: the function has raised; the message is its traceback.
        """
        try:
            piece = self.connection.recv(65536)
        except OSError:
            piece = b""
        if not piece:
            raise EOFError
        self._received += piece
        if not self._received.endswith(b"\n"):
            return None
        outcome: dict[str, Any] = json.loads(self._received)
        self._received = b""
        if "error" in outcome:
            raise RuntimeError(f"a worker process reports:\n{outcome['error']}")
        return outcome

    def close(self) -> None:
        """Let it end: at once if it waits for a job, with its job's time otherwise."""
        with contextlib.suppress(OSError):  # a forked copy of this process may hold the socket too
            self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()


class Nursery:
    """The process that forks workers. It is started when it is first needed, or again if it has died."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None

    @property
    def pid(self) -> int | None:
        """Its process id, once it has been started."""
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Start the process unless it runs, and do not wait for its imports."""
        with self._lock:
            self._started()

    def _started(self) -> socket.socket:
        """The socket that the running process listens to."""
        if self._control is None or self._process is None or self._process.poll() is not None:
            self._control, theirs = socket.socketpair()
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-c", _PROGRAM, str(theirs.fileno()), json.dumps(sys.path)],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,  # Ctrl-C in a terminal is for the parent alone
                )
        return self._control

    def new_worker(self, function: str) -> Worker:
        """A worker for the function that `module:name` stands for.

        Raises:
            RuntimeError: no process can be started, or it cannot import the function.
        """
        for _ in range(2):  # the nursery may have been killed meanwhile
            with self._lock:
                control = self._started()
                ours, theirs = socket.socketpair()
                try:
                    with theirs:
                        socket.send_fds(control, [function.encode()], [theirs.fileno()])
                    return Worker(ours)
                except (OSError, EOFError):
                    ours.close()
                    self.stop()
        raise RuntimeError(f"{sys.executable} cannot start the process that grades answers; its message is above")

    def stop(self) -> None:
        """End the process. Workers end when their own connections close."""
        if self._control and self._process:
            self._control.close()
            self._process.terminate()
            self._process.wait()
            self._process = None

    def abandon(self) -> None:
        """In a forked copy of this process: forget the nursery, which is not this copy's."""
        if self._control and self._process:
            self._control.close()
            self._process.returncode = 0  # as nobody may wait for it here
        self._control = self._process = None
        self._lock = threading.Lock()


FORK_SERVER = Nursery()
atexit.register(FORK_SERVER.stop)
os.register_at_fork(after_in_child=FORK_SERVER.abandon)
