"""Checkpoints: complete or absent, whatever happens to the disk."""

import io
import os
import subprocess
import sys

import pytest
import torch

from cs336_basics.checkpoint import load_checkpoint, save_checkpoint
from cs336_basics.optimizer import AdamW


def make(width=4, seed=0):
    torch.manual_seed(seed)
    model = torch.nn.Linear(3, width)
    optimizer = AdamW(model.parameters(), lr=0.1)
    model(torch.randn(2, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


def assert_same(one, other):
    for a, b in zip(one[0].parameters(), other[0].parameters()):
        assert torch.equal(a, b)
    for a, b in zip(one[1].state_dict()["state"].values(), other[1].state_dict()["state"].values()):
        assert all(torch.equal(torch.as_tensor(a[key]), torch.as_tensor(b[key])) for key in a)


@pytest.mark.parametrize("kind", ["str", "path", "buffer", "file"])
def test_round_trip(tmp_path, kind):
    saved, restored = make(seed=0), make(seed=1)
    path = tmp_path / "new folder" / "a.pt"
    if kind == "buffer":
        buffer = io.BytesIO()
        save_checkpoint(*saved, 17, buffer)
        buffer.seek(0)
        assert load_checkpoint(buffer, *restored) == 17
    elif kind == "file":
        path.parent.mkdir()
        with open(path, "wb") as file:
            save_checkpoint(*saved, 17, file)
        with open(path, "rb") as file:
            assert load_checkpoint(file, *restored) == 17
    else:
        where = str(path) if kind == "str" else path
        save_checkpoint(*saved, 17, where)
        assert load_checkpoint(where, *restored) == 17
        assert [item.name for item in path.parent.iterdir()] == ["a.pt"]
    assert_same(saved, restored)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_truncated_file_is_named(tmp_path, share):
    path = tmp_path / "a.pt"
    save_checkpoint(*make(), 1, path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ValueError, match=r"a\.pt is damaged .*; delete it to resume from the checkpoint before it"):
        load_checkpoint(path, *make())


def test_files_that_are_no_checkpoint_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"checkpoint .*b\.pt does not exist"):
        load_checkpoint(tmp_path / "b.pt", *make())
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="is not a checkpoint of this package"):
        load_checkpoint(tmp_path / "list.pt", *make())


def test_code_in_a_file_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made by the file"),)

    torch.save({"model": Evil(), "optimizer": {}, "iteration": 1}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="is damaged"):
        load_checkpoint(tmp_path / "evil.pt", *make())
    assert not (tmp_path / "made by the file").exists()


def test_another_shape_is_refused(tmp_path):
    save_checkpoint(*make(width=4), 1, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="does not fit this model"):
        load_checkpoint(tmp_path / "a.pt", *make(width=5))


def test_an_interrupted_save_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("cs336_basics.checkpoint.os.fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(*make(), 1, tmp_path / "a.pt")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path):
    """A limit on the size of files stands in for the full disk: the write fails halfway in the same manner."""
    saved = make()
    save_checkpoint(*saved, 1, tmp_path / "a.pt")
    program = """
import resource, signal, sys, torch
from cs336_basics.checkpoint import save_checkpoint
model = torch.nn.Linear(1000, 1000)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save_checkpoint(model, torch.optim.SGD(model.parameters()), 2, sys.argv[1])
except OSError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", program, tmp_path / "a.pt"], capture_output=True, text=True, check=True)
    assert run.stdout.count("\n") == 1
    assert "cannot write checkpoint" in run.stdout
    assert "File too large" in run.stdout
    assert "earlier checkpoints are untouched" in run.stdout
    restored = make(seed=1)
    assert load_checkpoint(tmp_path / "a.pt", *restored) == 1
    assert_same(saved, restored)
    assert [item.name for item in tmp_path.iterdir()] == ["a.pt"]
