"""Checkpoints: complete or absent, whatever happens to the disk."""

import json
import os
import random
import signal

import numpy as np
import pytest
import torch

from cs336_alignment.policy.loading import load_model, load_tokenizer
from cs336_alignment.runs import checkpoint
from cs336_alignment.runs.checkpoint import (
    checkpoints,
    latest_checkpoint,
    load_trainer_state,
    random_state,
    save_checkpoint,
    seed_everything,
    set_random_state,
)
from tests.tiny import tiny_model, tiny_tokenizer


def trained(seed=0):
    """A model, and an optimizer with a state."""
    model = tiny_model(seed=seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model(torch.arange(5)[None]).logits.square().mean().backward()
    optimizer.step()
    return model, optimizer


def save(run, step, keep=2, seed=0, **progress):
    model, optimizer = trained(seed)
    return save_checkpoint(run, step, model, tiny_tokenizer(), optimizer, keep, **progress), model, optimizer


def test_a_checkpoint_is_a_model_folder_with_the_state_of_training(tmp_path):
    path, model, optimizer = save(tmp_path, 20, update=40, questions_drawn=7)
    assert path == latest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step_00000020"
    read = load_model(path, "cpu")
    for name, weight in model.state_dict().items():
        assert torch.equal(read.state_dict()[name], weight), name
    assert load_tokenizer(path)("think")["input_ids"] == tiny_tokenizer()("think")["input_ids"]
    other = torch.optim.AdamW(read.parameters(), lr=1e-2)
    state = load_trainer_state(path, other)
    assert (state.step, state.progress) == (20, {"update": 40, "questions_drawn": 7})
    for ours, theirs in zip(optimizer.state_dict()["state"].values(), other.state_dict()["state"].values()):
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_random_numbers_go_on_where_they_were():
    def draw():
        return random.random(), np.random.normal(), torch.rand(2).tolist()

    seed_everything(3)
    first = draw()
    state = json.loads(json.dumps(random_state()))
    second = draw()
    assert first != second
    seed_everything(3)
    assert draw() == first
    set_random_state(state)
    assert draw() == second


def test_only_the_latest_are_kept(tmp_path):
    for step in (1, 2, 10):
        save(tmp_path, step)
    assert [path.name for path in checkpoints(tmp_path)] == ["step_00000002", "step_00000010"]
    save(tmp_path, 11, keep=1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000011"]


@pytest.mark.parametrize("moment", ["model", "optimizer", "state", "sync", "rename"])
def test_a_save_that_fails_leaves_the_checkpoint_before(tmp_path, monkeypatch, moment):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    save(tmp_path, 1)
    where = {
        "model": (checkpoint, "save_model"),
        "optimizer": (checkpoint.torch, "save"),
        "state": (checkpoint.Path, "write_text"),
        "sync": (os, "fsync"),
        "rename": (checkpoint.Path, "replace"),
    }[moment]
    monkeypatch.setattr(*where, full)
    with pytest.raises(OSError, match=r"cannot write checkpoint .*step_00000002 \(.*No space left on device\); free"):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert latest_checkpoint(tmp_path).name == "step_00000001"
    save(tmp_path, 3)  # sweeps up
    assert [path.name for path in checkpoints(tmp_path)] == ["step_00000001", "step_00000003"]
    assert not list((tmp_path / "checkpoints").glob("*.tmp"))


@pytest.mark.parametrize(("file", "share"), [("optimizer.pt", 0.5), ("optimizer.pt", 0), ("trainer_state.json", 0.5)])
def test_a_damaged_checkpoint_is_named(tmp_path, file, share):
    path, _, optimizer = save(tmp_path, 1)
    whole = (path / file).read_bytes()
    (path / file).write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(
        ValueError, match=r"step_00000001 is damaged \(.*\); delete it to resume from the checkpoint before it"
    ):
        load_trainer_state(path, optimizer)


def test_code_in_a_file_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made by the file"),)

    path, _, optimizer = save(tmp_path, 1)
    torch.save({"state": Evil()}, path / "optimizer.pt")
    with pytest.raises(ValueError, match="is damaged"):
        load_trainer_state(path, optimizer)
    assert not (tmp_path / "made by the file").exists()


def test_kill_minus_nine_while_writing(tmp_path, monkeypatch):
    save(tmp_path, 1)
    child = os.fork()  # a new process would import PyTorch for seconds
    if child == 0:
        signal.alarm(60)
        monkeypatch.setattr(checkpoint.torch, "save", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        save(tmp_path, 2)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert list((tmp_path / "checkpoints").glob("*.tmp"))
    assert [path.name for path in checkpoints(tmp_path)] == ["step_00000001"]
    save(tmp_path, 3)
    assert not list((tmp_path / "checkpoints").glob("*.tmp*"))
