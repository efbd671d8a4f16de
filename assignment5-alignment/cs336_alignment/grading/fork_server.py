"""The parent's side of the worker processes: starting them, and talking to one of them. `child` is their side."""

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
from cs336_alignment.grading.child import serve
serve(socket.socket(fileno=int(sys.argv[1])))
"""
_START_LIMIT_S = 120.0
_SEND_LIMIT_S = 10.0


class Worker:
    """A process that computes `function(response, truth)`, one call at a time.

    Raises:
        EOFError: there is no process at the other end of the connection.
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
        """Send the worker a call.

        Raises:
            OSError: the worker is dead.
        """
        self.connection.sendall(json.dumps([response, truth, seconds]).encode() + b"\n")

    def receive(self) -> dict[str, Any] | None:
        """Read what has arrived: the result of the call, under "result", or None while it is not complete.

        Raises:
            EOFError: the worker is dead.
            RuntimeError: the function raised an exception; the message is its traceback.
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
        """Let the worker end: at once if it is idle, otherwise when the time of its call is over."""
        with contextlib.suppress(OSError):  # a forked copy of this process may hold the socket too
            self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()


class ForkServer:
    """The process that forks workers. It is started when it is first needed, and again if it has died."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None

    @property
    def pid(self) -> int | None:
        """Process id of the server, once it has been started."""
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Start the process unless it is running. This does not wait for its imports."""
        with self._lock:
            self._started()

    def _started(self) -> socket.socket:
        """Return the socket that the running process listens to."""
        if self._control is None or self._process is None or self._process.poll() is not None:
            self._control, child_end = socket.socketpair()
            with child_end:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-c", _PROGRAM, str(child_end.fileno()), json.dumps(sys.path)],
                    pass_fds=[child_end.fileno()],
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,  # so that Ctrl-C in a terminal reaches the parent only
                )
        return self._control

    def new_worker(self, function: str) -> Worker:
        """Start a worker for the function that `module:name` refers to.

        Raises:
            RuntimeError: no process can be started, or it cannot import the function.
        """
        for _ in range(2):  # the server may have been killed in the meantime
            with self._lock:
                control = self._started()
                parent_end, child_end = socket.socketpair()
                try:
                    with child_end:
                        socket.send_fds(control, [function.encode()], [child_end.fileno()])
                    return Worker(parent_end)
                except (OSError, EOFError):
                    parent_end.close()
                    self.stop()
        raise RuntimeError(f"{sys.executable} could not start the process that grades answers; see its message above")

    def stop(self) -> None:
        """End the process. The workers end when their own connections close."""
        if self._control and self._process:
            self._control.close()
            self._process.terminate()
            self._process.wait()
            self._process = None

    def abandon(self) -> None:
        """Forget the server, in a forked copy of this process, which does not own it."""
        if self._control and self._process:
            self._control.close()
            self._process.returncode = 0  # as nobody may wait for it here
        self._control = self._process = None
        self._lock = threading.Lock()


FORK_SERVER = ForkServer()
atexit.register(FORK_SERVER.stop)
os.register_at_fork(after_in_child=FORK_SERVER.abandon)
