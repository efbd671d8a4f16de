"""Under every strategy Assignment 1's loop has the losses of one process, and goes on from every checkpoint."""

import json
import re
import shutil
import warnings
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from cs336_basics.model import ModelConfig
from cs336_basics.train_config import OptimizerConfig, TrainConfig
from cs336_basics.training import train
from cs336_systems.parallel.process_group import run_on_ranks
from cs336_systems.training.choices import STRATEGIES, resolve
from cs336_systems.training.strategies import Single, StrategyOptions

EVERY = tuple(STRATEGIES)
#: Differences of float32 sums in another order, after the optimizer.
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    tokens = np.random.default_rng(0).integers(0, 53, 4000).astype(np.uint16)
    np.save(folder / "train.npy", tokens)
    np.save(folder / "valid.npy", tokens[:300])
    return TrainConfig(
        run_dir=folder / "single", train_data=folder / "train.npy", valid_data=folder / "valid.npy",
        model=ModelConfig(53, 8, 16, 2, 2, 24), optimizer=OptimizerConfig(lr=1e-2, warmup_steps=1, eps=1e-5),
        steps=6, batch_size=12, microbatches=2, eval_every=3, checkpoint_every=3, keep_checkpoints=5, eval_sequences=13,
        log_every=1, device="cpu",
    )  # fmt: skip


@pytest.fixture(scope="module")
def single(config):
    train(config, Single("cpu", StrategyOptions()))
    return losses(config.run_dir)


def losses(run: Path) -> list[dict]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = ("step", "loss", "grad_norm", "valid_loss")
    return [{name: record[name] for name in kept if name in record} for record in records]


def assert_close(ours: list[dict], theirs: list[dict]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, abs=TOLERANCE)


def train_in_processes(process, name, config, options=None):
    torch.manual_seed(100 + process.rank)  # what a process drew before must not matter
    train(config, resolve(STRATEGIES, name)(process, options or StrategyOptions()))


def without_last_checkpoint(run: Path, copy: Path) -> Path:
    """What an interruption after step 3 leaves behind."""
    shutil.copytree(run, copy)
    last = copy / "checkpoints" / "step_00000006.pt"
    shutil.rmtree(last) if last.is_dir() else last.unlink()
    return copy


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("name", EVERY)
def test_losses_are_those_of_one_process(name, world_size, config, single, workers):
    run = config.run_dir.with_name(f"{name}-{world_size}")
    workers.run(train_in_processes, world_size, name, replace(config, run_dir=run))
    assert_close(losses(run), single)


@pytest.mark.parametrize(
    ("first", "first_size", "second", "second_size"),
    [
        ("fsdp", 3, "fsdp", 2),
        ("fsdp", 2, "torch-fsdp2", 3),
        ("torch-fsdp2", 2, "ddp+sharded-optimizer", 3),
        ("ddp+sharded-optimizer", 2, "ddp", 2),
        ("ddp", 2, "fsdp", 3),
    ],
)
def test_another_strategy_on_other_processes_goes_on(
    first, first_size, second, second_size, config, single, workers, tmp_path
):
    whole = config.run_dir.with_name(f"{first}-{first_size}")
    if not whole.exists():
        workers.run(train_in_processes, first_size, first, replace(config, run_dir=whole))
    run = without_last_checkpoint(whole, tmp_path / "copy")
    workers.run(train_in_processes, second_size, second, replace(config, run_dir=run))
    assert_close(losses(run), single)


@pytest.mark.parametrize("first", ["fsdp", "torch-fsdp2", "ddp+sharded-optimizer"])
def test_one_process_goes_on_with_what_several_wrote(first, config, single, workers, tmp_path):
    whole = config.run_dir.with_name(f"{first}-2")
    if not whole.exists():
        workers.run(train_in_processes, 2, first, replace(config, run_dir=whole))
    run = without_last_checkpoint(whole, tmp_path / "copy")
    train(replace(config, run_dir=run), Single("cpu", StrategyOptions()))
    assert_close(losses(run), single)


def test_a_resumed_run_of_the_same_processes_continues_bit_for_bit(config, single, workers, tmp_path):
    whole = config.run_dir.with_name("fsdp-2")
    if not whole.exists():
        workers.run(train_in_processes, 2, "fsdp", replace(config, run_dir=whole))
    run = without_last_checkpoint(whole, tmp_path / "copy")
    workers.run(train_in_processes, 2, "fsdp", replace(config, run_dir=run))
    assert losses(run) == losses(whole)


@pytest.mark.gpu
@pytest.mark.parametrize("name", EVERY)
def test_two_processes_share_a_gpu_over_gloo(name, config, tmp_path):
    """Beside one process, and again from the checkpoint in the middle."""
    alone, run = (replace(config, run_dir=tmp_path / part, device="cuda") for part in ("alone", "together"))
    train(alone, Single("cuda", StrategyOptions()))
    over_gloo = partial(run_on_ranks, train_in_processes, 2, name, backend="gloo", device="cuda", timeout_s=120)
    over_gloo(run)
    assert_close(losses(run.run_dir), losses(alone.run_dir))
    resumed = replace(run, run_dir=without_last_checkpoint(run.run_dir, tmp_path / "resumed"))
    over_gloo(resumed)
    assert_close(losses(resumed.run_dir), losses(alone.run_dir))


def fail_to_write(process, config):
    strategy = resolve(STRATEGIES, "fsdp")(process, StrategyOptions())
    full = OSError(28, "No space left on device")
    disk = mock.patch.object(torch, "save", side_effect=full) if process.rank == 1 else nullcontext()
    with disk, pytest.raises(OSError, match="cannot write") as raised:
        train(config, strategy)
    return str(raised.value)


def test_a_full_disk_of_one_process_ends_all_with_one_sentence(config, workers):
    run = config.run_dir.with_name("full")
    messages = workers.run(fail_to_write, 2, replace(config, run_dir=run))
    assert messages[0] == messages[1]
    assert "No space left on device" in messages[0]
    assert "earlier checkpoints are untouched" in messages[0]
    assert not list((run / "checkpoints").iterdir())  # no half of a checkpoint


def train_compiled(process, name, config):
    """The names of what was given to torch.compile, whose default backend would need minutes."""
    warnings.simplefilter("ignore")  # Dynamo's own
    with mock.patch.object(torch, "compile", side_effect=partial(torch.compile, backend="eager")) as compile_:
        train(config, resolve(STRATEGIES, name)(process, StrategyOptions()))
    return sorted(call.args[0].__name__ for call in compile_.call_args_list)


@pytest.mark.parametrize("name", ["ddp-bucketed", "fsdp"])
def test_compile_means_block_by_block(name, config, single, workers):
    run = config.run_dir.with_name(f"compiled-{name}")
    compiled = workers.run(train_compiled, 2, name, replace(config, run_dir=run, compile=True), timeout_s=180)
    # The loop asks for the whole model, `_call_impl`, which is taken back.
    assert compiled == [["_call_impl", "cross_entropy", "forward", "forward"]] * 2
    assert_close(losses(run), single)


def test_bfloat16_weights_travel_and_the_loss_stays_close(config, single, workers):
    run = config.run_dir.with_name("bfloat16")
    options = StrategyOptions(compute_dtype=torch.bfloat16)
    workers.run(train_in_processes, 2, "fsdp", replace(config, run_dir=run, precision="bfloat16"), options)
    for ours, theirs in zip(losses(run), single, strict=True):
        assert ours == pytest.approx(theirs, abs=0.1)


@pytest.mark.parametrize("name", ["ddp", "ddp-bucketed"])
def test_muon_where_gradients_are_whole(name, config, workers):
    config = replace(config, optimizer=replace(config.optimizer, name="normuon"))
    alone, run = config.run_dir.with_name(f"muon-{name}"), config.run_dir.with_name(f"muon-{name}-2")
    train(replace(config, run_dir=alone), Single("cpu", StrategyOptions()))
    workers.run(train_in_processes, 2, name, replace(config, run_dir=run))
    for ours, theirs in zip(losses(run), losses(alone), strict=True):  # its products round in bfloat16
        assert ours == pytest.approx(theirs, abs=1e-2)
    shutil.copytree(run, other := run.with_name(f"{run.name}-resumed"))
    (other / "checkpoints" / "step_00000006.pt").unlink()
    workers.run(train_in_processes, 2, name, replace(config, run_dir=other))
    assert losses(other) == losses(run)


@pytest.mark.parametrize("name", ["ddp+sharded-optimizer", "fsdp", "torch-fsdp2"])
def test_muon_is_refused_where_they_are_not(name, config, workers):
    config = replace(
        config, optimizer=replace(config.optimizer, name="muon"), run_dir=config.run_dir.with_name("muon-refused")
    )
    with pytest.raises(Exception, match=f"strategy {re.escape(name)} shards parameters, and Muon needs"):
        workers.run(train_in_processes, 2, name, config)
