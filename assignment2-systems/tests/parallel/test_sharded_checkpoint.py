"""Pieces of several processes make whole tensors; what is damaged or of another model is refused."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from cs336_basics.checkpoint import save_checkpoint
from cs336_basics.model import Linear
from cs336_basics.optimizer import AdamW
from cs336_systems.parallel import FSDP
from cs336_systems.parallel.fsdp_unit import ShardRange
from cs336_systems.parallel.sharded_checkpoint import Checkpoint, save_sharded


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Linear(7, 5), nn.LayerNorm(5), Linear(5, 3))


def stepped(model, optimizer):
    torch.manual_seed(1)
    model(torch.randn(4, 7)).square().mean().backward()
    return optimizer


def write(process, path):
    model = small_model()
    wrapped = FSDP(model)
    optimizer = stepped(wrapped, AdamW(wrapped.parameters(), lr=0.1))
    wrapped.finish_gradient_synchronization()
    optimizer.step()
    save_sharded(path, model, optimizer, wrapped.shard_ranges(), iteration=7, note="hello")
    return wrapped.gather_full_params()


@pytest.fixture
def checkpoint(workers, tmp_path):
    """A folder that three processes wrote, and the parameters in it."""
    path = tmp_path / "step.pt"
    return path, workers.run(write, 3, path)[0]


def test_it_holds_what_one_process_would_have(checkpoint):
    path, parameters = checkpoint
    model = small_model()
    optimizer = stepped(model, AdamW(model.parameters(), lr=0.1))
    optimizer.step()
    loaded = small_model()
    loaded_optimizer = AdamW(loaded.parameters())
    opened = Checkpoint(path, [name for name, _ in loaded.named_parameters()])
    opened.load_model(loaded, {})
    opened.load_optimizer(loaded, loaded_optimizer, {})
    assert opened.header == {"iteration": 7, "note": "hello"}
    for (name, ours), theirs in zip(loaded.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, parameters[name])
        torch.testing.assert_close(ours, theirs)
    for (number, ours), theirs in zip(
        loaded_optimizer.state_dict()["state"].items(), optimizer.state_dict()["state"].values(), strict=True
    ):
        assert ours["t"] == theirs["t"] == 1, number
        torch.testing.assert_close(ours["m"], theirs["m"])
        torch.testing.assert_close(ours["v"], theirs["v"])
    assert loaded_optimizer.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize(("start", "stop"), [(0, 35), (0, 0), (3, 4), (11, 13), (10, 30), (34, 35)])
def test_any_range_of_elements_can_be_read(checkpoint, start, stop):
    path, parameters = checkpoint
    weight = parameters["0.weight"]
    read = Checkpoint(path, []).tensor("model.0.weight", ShardRange(weight.shape, start, stop))
    assert torch.equal(read, weight.reshape(-1)[start:stop])


def test_a_single_file_is_read_alike(tmp_path):
    model = small_model()
    optimizer = stepped(model, AdamW(model.parameters()))
    optimizer.step()
    save_checkpoint(model, optimizer, 3, tmp_path / "file.pt", seconds=1.5)
    opened = Checkpoint(tmp_path / "file.pt", [name for name, _ in model.named_parameters()])
    assert opened.header == {"iteration": 3, "seconds": 1.5}
    other = copy.deepcopy(model)
    other_optimizer = AdamW(other.parameters())
    opened.load_optimizer(other, other_optimizer, {})
    state = optimizer.state_dict()["state"]
    for number, entries in other_optimizer.state_dict()["state"].items():
        assert torch.equal(entries["m"], state[number]["m"])
        assert entries["t"] == 1


def test_a_missing_share_is_named(checkpoint):
    path, _ = checkpoint
    (path / "process_00001.pt").unlink()
    with pytest.raises(ValueError, match=r"damaged \(only 2 of 3 files exist\)"):
        Checkpoint(path, [])


def test_a_truncated_share_is_refused(checkpoint):
    path, _ = checkpoint
    share = path / "process_00002.pt"
    share.write_bytes(share.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"is damaged .* delete it to continue from the one before it"):
        Checkpoint(path, [])


class Code:
    """What a pickle runs when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_checkpoint_cannot_run_code(checkpoint, tmp_path):
    """torch.distributed.checkpoint unpickles its metadata without restriction and would run it (see LOG.md)."""
    path, _ = checkpoint
    torch.save(Code(tmp_path / "ran"), path / "process_00001.pt")
    with pytest.raises(ValueError, match="is damaged"):
        Checkpoint(path, [])
    assert not (tmp_path / "ran").exists()
    torch.load(path / "process_00001.pt", weights_only=False)
    assert (tmp_path / "ran").exists()


def test_another_model_is_refused(checkpoint):
    path, _ = checkpoint
    other = nn.Sequential(Linear(7, 5), nn.LayerNorm(5), Linear(5, 4))
    with pytest.raises(
        ValueError, match=r"does not fit this model: 2.weight has shape \(3, 5\) there, but must have shape \(4, 5\)"
    ):
        Checkpoint(path, []).load_model(other, {})
    with pytest.raises(ValueError, match=r"3.weight is missing there, but must have shape \(2, 3\)"):
        Checkpoint(path, []).load_model(nn.Sequential(*small_model(), Linear(3, 2)), {})


def test_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        Checkpoint(tmp_path / "nothing.pt", [])


def test_what_a_killed_job_left_behind_is_in_nobodys_way(workers, tmp_path):
    unfinished = tmp_path / "step.pt.tmp"
    unfinished.mkdir()
    (unfinished / "process_00000.pt").write_bytes(b"half")
    workers.run(write, 2, tmp_path / "step.pt")
    assert sorted(path.name for path in (tmp_path / "step.pt").iterdir()) == ["process_00000.pt", "process_00001.pt"]
    assert not unfinished.exists()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Linear(5, 5), Linear(5, 5)
        self.second.weight = self.first.weight


def write_and_read_tied(process, path):
    torch.manual_seed(0)
    model = FSDP(Tied())
    optimizer = AdamW(model.parameters())
    before = model.gather_full_params()
    save_sharded(path, model.module, optimizer, model.shard_ranges(), iteration=1)
    torch.manual_seed(1)
    other = FSDP(Tied())
    Checkpoint(path, []).load_model(other.module, other.shard_ranges())
    for name, parameter in other.gather_full_params().items():
        assert torch.equal(parameter, before[name])


def test_tied_weights(workers, tmp_path):
    workers.run(write_and_read_tied, 2, tmp_path / "step.pt")
