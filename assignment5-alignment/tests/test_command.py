"""What becomes of a command's errors."""

import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch

from cs336_alignment.command import run_command


@dataclass(frozen=True)
class Add:
    """Add a number to another."""

    number: int = 1
    """One of them."""

    def execute(self):
        print(self.number + 1)


def run(*args):
    run_command(Add, "sums", args, interrupted="nothing is kept", out_of_memory="add less")


def test_a_command_gets_its_options(capsys):
    run("--number", "41")
    assert capsys.readouterr().out == "42\n"


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted; nothing is kept"),
        (torch.OutOfMemoryError("CUDA out of memory.\nmore"), 2, "memory is full (CUDA out of memory.); add less"),
        (ValueError("this\nis that"), 2, "this is that"),
        (FloatingPointError("the loss is nan"), 2, "the loss is nan"),
        (FileNotFoundError("there is no such thing"), 2, "there is no such thing"),
        (PermissionError(13, "Permission denied", "/a/file"), 2, "Permission denied: /a/file"),
    ],
)
def test_an_error_is_one_line(error, status, message, monkeypatch, capsys):
    def execute(self):
        raise error

    monkeypatch.setattr(Add, "execute", execute)
    with pytest.raises(SystemExit) as caught:
        run()
    (line,) = capsys.readouterr().err.splitlines()
    assert caught.value.code == status
    assert line.startswith("sums: ")
    assert line.endswith(message)


def test_a_bug_is_no_mistake_of_the_user(monkeypatch):
    def execute(self):
        raise RuntimeError("a bug")

    monkeypatch.setattr(Add, "execute", execute)
    with pytest.raises(RuntimeError, match="a bug"):
        run()


def test_a_reader_that_has_seen_enough():
    program = """
from dataclasses import dataclass
from cs336_alignment.command import run_command
@dataclass
class Print:
    def execute(self):
        while True:
            print("a line")
run_command(Print, "lines", [], interrupted="", out_of_memory="")
"""
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"a line\n"
        process.stdout.close()
        assert (process.wait(timeout=120), process.stderr.read()) == (0, b"")
