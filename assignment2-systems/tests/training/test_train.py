"""The training command: alone and under torchrun, killed and started again, made into one file."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from cs336_basics.checkpoint import read_checkpoint
from cs336_basics.load_run import load_model
from cs336_basics.model import ModelConfig
from cs336_basics.train_config import TrainConfig
from cs336_systems.training.choices import STRATEGIES, resolve
from cs336_systems.training.options import Consolidate, Train
from cs336_systems.training.strategies import StrategyOptions

SHAPE = {"vocab-size": 53, "context-length": 8, "d-model": 16, "num-layers": 2, "num-heads": 2, "d-ff": 24}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    tokens = np.random.default_rng(0).integers(0, 53, 4000).astype(np.uint16)
    np.save(folder / "train.npy", tokens)
    np.save(folder / "valid.npy", tokens[:300])
    return folder


@pytest.fixture
def config(data, tmp_path):
    return TrainConfig(
        run_dir=tmp_path / "run", train_data=data / "train.npy", valid_data=data / "valid.npy",
        model=ModelConfig(53, 8, 16, 2, 2, 24), steps=4, batch_size=4, checkpoint_every=2, device="cpu",
    )  # fmt: skip


def torchrun(data, run, *launcher, steps=4, before=()):
    options = {**SHAPE, "batch-size": 4, "steps": steps, "checkpoint-every": 2, "eval-windows": 8, "device": "cpu"}
    options |= {"run": run, "train-data": data / "train.npy", "valid-data": data / "valid.npy"}
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *launcher),
        *("-m", "cs336_systems", "--", "train", *before, "tinystories-40m-tokens"),
        *(word for name, value in options.items() for word in (f"--{name}", str(value))),
    ]


def losses(run):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


def test_two_processes_have_the_losses_of_one(config, data, tmp_path, capsys):
    Train(config).execute()
    assert "step 4: training loss" in capsys.readouterr().out
    command = torchrun(data, tmp_path / "two", "--standalone")
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert result.stdout.count("step 4: training loss") == 1  # rank 0 speaks
    assert losses(tmp_path / "two") == pytest.approx(losses(config.run_dir), abs=1e-5)


def test_a_killed_process_is_noticed_and_the_job_goes_on(data, tmp_path):
    run = tmp_path / "run"
    command = torchrun(
        data, run, "--standalone", "--max-restarts", "1", steps=150, before=("--strategy", "fsdp", "--timeout-s", "60")
    )
    with open(tmp_path / "log", "w") as log:
        job = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 200
        while not list(run.glob("checkpoints/*.pt")):
            assert job.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        os.kill(_process_of_rank(1, run), signal.SIGKILL)
        assert job.wait(timeout=200) == 0, (tmp_path / "log").read_text()
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
    text = (tmp_path / "log").read_text()
    assert re.search(r"cs336-systems: (rank 0 has lost the others|told to stop)", text)
    assert "resuming from" in text
    assert "step 150: training loss" in text


def _process_of_rank(rank, run):
    """The number of the process that trains in this run's folder as this rank."""
    for folder in os.listdir("/proc"):
        try:
            with open(f"/proc/{folder}/cmdline") as words, open(f"/proc/{folder}/environ") as variables:
                if str(run) in words.read() and f"RANK={rank}" in variables.read().split("\0"):
                    return int(folder)
        except (OSError, UnicodeDecodeError):
            continue
    raise AssertionError("there is no such process")


def test_a_strategy_of_several_needs_torchrun(config, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="torchrun --nproc-per-node 2 -m cs336_systems"):
        Train(config, strategy="fsdp").execute()


def test_single_refuses_several(config, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="strategy single is for one rank"):
        Train(config, strategy="single").execute()


def train_fsdp(process, config):
    from cs336_basics.training import train

    strategy = resolve(STRATEGIES, "fsdp")(process, StrategyOptions())
    train(config, strategy)


def test_consolidate_makes_what_generate_reads(config, workers, capsys):
    workers.run(train_fsdp, 2, config)
    with pytest.raises(FileNotFoundError):
        read_checkpoint(config.run_dir / "checkpoints" / "step_00000004.pt")  # a folder
    Consolidate(config.run_dir).execute()
    assert "cs336-basics generate" in capsys.readouterr().out
    whole = load_model(config.run_dir, "cpu", config.run_dir / "consolidated.pt")
    alone = replace(config, run_dir=config.run_dir.with_name("alone"))
    Train(alone).execute()
    for ours, theirs in zip(whole.parameters(), load_model(alone.run_dir, "cpu").parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)
    assert read_checkpoint(config.run_dir / "consolidated.pt")["iteration"] == 4


def test_consolidate_copies_what_is_one_file(config, tmp_path, capsys):
    Train(replace(config, optimizer=replace(config.optimizer, name="muon"))).execute()
    Consolidate(config.run_dir, output=tmp_path / "copy.pt").execute()
    assert "copy.pt; cs336-basics generate" in capsys.readouterr().out
    checkpoint = config.run_dir / "checkpoints" / "step_00000004.pt"
    assert (tmp_path / "copy.pt").read_bytes() == checkpoint.read_bytes()


def test_consolidate_needs_a_checkpoint(config):
    config.run_dir.mkdir()
    with pytest.raises(FileNotFoundError, match="train a model first"):
        Consolidate(config.run_dir).execute()
