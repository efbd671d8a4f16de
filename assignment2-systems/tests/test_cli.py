"""The command line: every command explains itself, and a mistake is one line and exit status 2."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cs336_systems import cli
from cs336_systems.instruments.options.one_gpu import MixedPrecision

COMMANDS = [
    "train",
    "consolidate",
    "bench-step",
    "profile",
    "memory",
    "checkpointing",
    "mixed-precision",
    "bench-attention",
    "bench-flash",
    "leaderboard-2025",
    "leaderboard-2026",
    "bench-allreduce",
    "bench-ddp",
    "bench-sharding",
    "bench-fsdp",
    "scaling",
    "accounting",
    "fit-buckets",
]


def fails(capsys, *arguments):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert error.startswith("cs336-systems: ")
    return caught.value.code, error


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert all(command in out for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_every_field(command, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([command, "--help"])
    assert caught.value.code == 0
    lines = capsys.readouterr().out.replace("│", " ").splitlines()
    options = [line.split() for line in lines if line.strip().startswith("--")]
    assert options
    text = " ".join(" ".join(lines).split())
    for words in options:
        rest = text.split(words[0], 1)[1]
        assert any(letter.islower() for letter in rest.split("(default")[0].split("(required")[0]), words[0]


def test_a_wrong_value_is_one_line(capsys, tmp_path):
    code, error = fails(capsys, "bench-flash", "--heads", "0", "--out", str(tmp_path))
    assert (code, "--heads is 0, but must be at least 1" in error) == (2, True)
    (tmp_path / "file").touch()
    code, error = fails(capsys, "mixed-precision", "--out", str(tmp_path / "file"))
    assert (code, str(tmp_path / "file") in error) == (2, True)


def test_a_name_that_does_not_exist_exits_with_2(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["bench-flash", "--attentions", "fastest"])
    assert caught.value.code == 2
    assert "fastest" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (torch.OutOfMemoryError("CUDA out of memory.\nmore"), 2, "memory is full (CUDA out of memory.)"),
        (ValueError("this is that"), 2, "this is that"),
        (FileNotFoundError("there is no such thing"), 2, "there is no such thing"),
    ],
)
def test_errors(error, status, message, monkeypatch, capsys):
    def execute(self):
        raise error

    monkeypatch.setattr(MixedPrecision, "execute", execute)
    code, line = fails(capsys, "mixed-precision")
    assert (code, message in line) == (status, True)


def test_the_installed_program_runs(tmp_path):
    program = Path(sys.executable).with_name("cs336-systems")
    command = [str(program), "mixed-precision", "--out", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "9.953" in result.stdout
    assert (tmp_path / "mixed_precision.json").is_file()


def test_it_runs_as_a_module(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["cs336_systems", "bench-flash", "--heads", "0"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("cs336_systems", run_name="__main__")
    assert caught.value.code == 2
    assert "--heads is 0" in capsys.readouterr().err
