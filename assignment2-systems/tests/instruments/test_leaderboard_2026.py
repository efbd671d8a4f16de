"""Both contestants do the same arithmetic as one process; memory is what a calculation by hand says."""

import functools
import json
import os

import pytest
import torch
import torch.distributed as dist

from cs336_basics.model import BasicsTransformerLM, ModelConfig
from cs336_basics.nn_utils import cross_entropy
from cs336_basics.optimizer import AdamW
from cs336_systems.instruments import leaderboard_2026
from cs336_systems.instruments.leaderboard_2026 import OPTIMIZER_OPTIONS, batch_of, model_shape, run_or_out_of_memory
from cs336_systems.instruments.measure import result_file
from cs336_systems.instruments.options.many_gpus import Leaderboard2026
from cs336_systems.kernels import triton_support
from cs336_systems.parallel.process_group import Rank, run_on_ranks
from cs336_systems.training.step import torch_loss
from tests.workers import START_METHOD

CPU = torch.device("cpu")
TINY = {
    "vocab": 96, "context": 24, "d_model": 32, "d_ff": 48, "layers": 2, "heads": 2, "batch_size": 2, "processes": 2,
    "mode": "eager", "warmup": 1, "steps": 2, "device": "cpu",
}  # fmt: skip
LEADERBOARD = ModelConfig(151_936, 32_768, d_model=4096, num_layers=34, num_heads=32, d_ff=11_008)
#: What `measure_contestant` returns in each of two processes.
PARTS = [
    {"times_s": [9.0, 2.0, 4.0], "losses": [3.0, 2.0, 1.0], "matmul_TFLOP/s": 1e-6, "initial_GB": 1.0, "peak_GB": 2.5},
    {"times_s": [7.0, 3.0, 1.0], "losses": [5.0, 4.0, 3.0], "matmul_TFLOP/s": 3e-6, "initial_GB": 1.5, "peak_GB": 2.0},
]


def losses_of_one_process(options):
    """Assignment 1's model, loss and optimizer, on the batches of all processes at once."""
    torch.manual_seed(0)
    model = BasicsTransformerLM.from_config(model_shape(options))
    optimizer = AdamW(model.parameters(), **OPTIMIZER_OPTIONS)
    batches = [batch_of(options, Rank(rank, options.processes, CPU)) for rank in range(options.processes)]
    ids, targets = (torch.cat(tensors) for tensors in zip(*batches))
    losses = []
    for _ in range(options.warmup + options.steps):
        optimizer.zero_grad()
        loss = cross_entropy(model(ids), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_both_contestants_train_as_one_process_does(workers, tmp_path, monkeypatch, capsys):
    def run(function, world_size, *args, **kwargs):
        return workers.run(function, world_size, *args)

    monkeypatch.setattr(leaderboard_2026, "run_on_ranks", run)
    options = Leaderboard2026(out=tmp_path, **(TINY | {"steps": 1}))
    options.execute()
    record = json.loads((tmp_path / "leaderboard_2026.json").read_text(encoding="utf-8"))
    expected = losses_of_one_process(options)
    assert expected[0] - expected[-1] > 1e-4
    assert [row["contestant"] for row in record["rows"]] == ["ours", "torch"]
    for row in record["rows"]:
        assert row["status"] == "ok"
        assert row["losses"] == pytest.approx(expected, abs=2e-5)
        assert (row["first_loss"], row["last_loss"]) == (row["losses"][0], row["losses"][-1])
        assert (len(row["losses"]), len(row["times_s"])) == (2, 1)
        assert row["tokens/s"] == pytest.approx(2 * 2 * 24 / row["seconds"])
    assert record["rows"][1]["loss_difference"] < 2e-5
    assert (record["batch"], record["processes"], record["compute"]) == (4, 2, "float32")
    assert "best 3.84 s" in capsys.readouterr().out


def test_a_row_is_that_of_the_slowest_process(monkeypatch, tmp_path):
    """By hand: steps take 9, 3 and 4 s, of which the first is warm-up; a mean product reaches 2 MFLOP/s."""
    options = Leaderboard2026(out=tmp_path, **TINY)
    outcomes = iter([PARTS, None])
    monkeypatch.setattr(leaderboard_2026, "run_or_out_of_memory", lambda *_, **__: next(outcomes))
    file = result_file(options, "what", CPU)
    ours, torchs = leaderboard_2026.leaderboard_rows(options, CPU, file)
    # A block: 4 * 32² + 3 * 32 * 48 weights; the head: 32 * 96. Attention: 2 heads, 24²/2 pairs, 2 products of 16.
    operations = 3 * 4 * (2 * 24 * (2 * (4 * 1024 + 3 * 1536) + 3072) + 2 * 2 * (24 * 24 / 2) * 2 * 2 * 16)
    assert ours["seconds"] == 3.5
    assert ours["first_step_s"] == 9
    assert ours["tokens/s"] == pytest.approx(4 * 24 / 3.5)
    assert ours["of_matmul"] == pytest.approx(operations / 2 / 3.5 / 2e6)
    assert ours["losses"] == [4, 3, 2]
    assert (ours["initial_GB"], ours["peak_GB"]) == (1.5, 2.5)
    assert "loss_difference" not in ours
    assert torchs["status"] == "out of memory"
    assert "seconds" not in torchs
    assert json.loads(file.path.read_text(encoding="utf-8"))["rows"] == [ours, torchs]


def one_runs_out_of_memory(process, which):
    """The others wait for it."""
    if process.rank == which:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")
    dist.barrier()
    return {}


def test_out_of_memory_on_any_process_hangs_nobody(monkeypatch):
    started = functools.partial(run_on_ranks, start_method=START_METHOD)
    monkeypatch.setattr(leaderboard_2026, "run_on_ranks", started)
    assert run_or_out_of_memory(one_runs_out_of_memory, 2, CPU, 1, timeout_s=120) is None


def test_other_failures_are_not_taken_for_it(tmp_path):
    def fails(process):
        raise RuntimeError("a bug")

    note = tmp_path / "note"
    with pytest.raises(RuntimeError, match="a bug"):
        leaderboard_2026._ends_without_memory(Rank(0, 1, CPU), fails, note, ())
    assert not note.exists()


def test_torch_loss_is_assignment_1s():
    hidden, weight, targets = torch.randn(2, 5, 8), torch.randn(11, 8), torch.randint(11, (2, 5))
    torch.testing.assert_close(torch_loss(hidden, weight, targets), cross_entropy(hidden @ weight.T, targets))


def test_processes_get_different_rows():
    options = Leaderboard2026(**TINY)
    (ids, targets), (others, _) = (batch_of(options, Rank(rank, 2, CPU)) for rank in range(2))
    assert ids.shape == (2, 24)
    assert torch.equal(ids[:, 1:], targets[:, :-1])
    assert not torch.equal(ids, others)


def test_errors_tell_what_to_do(monkeypatch, tmp_path):
    def fails(match, **changes):
        with pytest.raises(ValueError, match=match):
            Leaderboard2026(out=tmp_path, **(TINY | changes)).execute()

    fails("--steps is 0", steps=0)
    fails("--contestants was given none", contestants=())
    fails("not a multiple of num_heads", heads=3)
    with monkeypatch.context() as changed:
        changed.setattr(triton_support, "INTERPRETED", False)
        fails("set TRITON_INTERPRET=1", device="cpu")
        changed.setenv("TORCHELASTIC_RUN_ID", "1")
        fails("run it without torchrun")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    fails("--processes is 2, and each needs a GPU, but torch sees 1", device="cuda")
    assert not os.listdir(tmp_path)


def test_the_defaults_are_the_leaderboards(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    options = Leaderboard2026()
    assert model_shape(options) == LEADERBOARD
    assert (options.mode, options.batch_size) == ("compiled-blocks", 1)


@pytest.mark.gpu
def test_one_gpu(tmp_path):
    """A process alone, compiled, in bfloat16."""
    shape = {"vocab": 5000, "context": 2048, "d_model": 1024, "d_ff": 2816, "layers": 4, "heads": 8, "processes": 1}
    Leaderboard2026(out=tmp_path, warmup=1, steps=2, **shape).execute()
    ours, torchs = json.loads((tmp_path / "leaderboard_2026.json").read_text(encoding="utf-8"))["rows"]
    assert (ours["status"], torchs["status"]) == ("ok", "ok")
    assert torchs["loss_difference"] < 2e-3
    for row in (ours, torchs):
        assert row["initial_GB"] == pytest.approx(row["predicted_initial_GB"], rel=0.1)
        assert row["peak_GB"] == pytest.approx(row["predicted_peak_GB"], rel=0.1)
        assert 0 < row["of_matmul"] < 1
