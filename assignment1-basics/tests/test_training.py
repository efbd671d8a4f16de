"""The training loop: it learns, resumes bit for bit, and says what is wrong."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from cs336_basics import training
from cs336_basics.checkpoint import checkpoints, read_checkpoint
from cs336_basics.data import batch_starts
from cs336_basics.model import BasicsTransformerLM
from cs336_basics.model_config import ModelConfig
from cs336_basics.optimizer import AdamW
from cs336_basics.run_folder import read_metrics
from cs336_basics.run_log import RunLog
from cs336_basics.strategy import SingleDevice, resolve_device
from cs336_basics.train_config import OPTIMIZERS, OptimizerConfig, TrainConfig, read_model_config
from cs336_basics.training import evaluate, train

MODEL = ModelConfig(vocab_size=20, context_length=8, d_model=16, num_layers=1, num_heads=2)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A text that counts upwards, with noise: easy to learn, impossible to know by heart."""
    folder = tmp_path_factory.mktemp("data")
    for name, seed in (("train", 0), ("valid", 1)):
        steps = np.random.default_rng(seed).choice([1, 2], p=[0.9, 0.1], size=2000)
        np.save(folder / f"{name}.npy", (np.cumsum(steps) % 20).astype(np.uint16))
    return folder


@pytest.fixture
def config(data, tmp_path):
    return TrainConfig(
        run_dir=tmp_path / "run", train_data=data / "train.npy", valid_data=data / "valid.npy", model=MODEL,
        optimizer=OptimizerConfig(lr=1e-2, warmup_steps=5), steps=24, batch_size=4, device="cpu",
        log_every=3, eval_every=8, checkpoint_every=6, eval_sequences=None,
    )  # fmt: skip


def losses(run):
    """What must not depend on interruptions: everything but the clock."""
    clock = ("seconds", "tokens_per_second")
    return [{k: v for k, v in record.items() if k not in clock} for record in read_metrics(run / "metrics.jsonl")]


def test_it_learns(config):
    latest = train(dataclasses.replace(config, steps=150, batch_size=16))
    assert latest["valid_loss"] < 1.0 < np.log(20)  # the best there is, the entropy of a step, is 0.33
    records = read_metrics(config.run_dir / "metrics.jsonl")
    assert [r["step"] for r in records if "loss" in r] == list(range(1, 151))
    assert [r["step"] for r in records if "valid_loss" in r] == [*range(8, 151, 8), 150]
    assert {"loss", "lr", "grad_norm", "tokens", "seconds", "tokens_per_second"} <= records[0].keys()
    stored = json.loads((config.run_dir / "config.json").read_text())
    assert stored["config"]["model"]["d_model"] == 16
    assert stored["environment"]["torch"] == torch.__version__.split("+")[0]
    assert read_model_config(config.run_dir) == MODEL
    assert [path.name for path in checkpoints(config.run_dir)] == ["step_00000144.pt", "step_00000150.pt"]


def test_first_steps_equal_a_loop_written_out_with_torch(config, data):
    train(dataclasses.replace(config, steps=6, eval_every=6))
    torch.manual_seed(config.seed)
    model = BasicsTransformerLM.from_config(MODEL)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    tokens = torch.from_numpy(np.load(data / "train.npy").astype(np.int64))
    for record in [r for r in read_metrics(config.run_dir / "metrics.jsonl") if "loss" in r]:
        starts = batch_starts(len(tokens), 8, 4, 0, record["step"])
        x = torch.stack([tokens[s : s + 8] for s in starts])
        y = torch.stack([tokens[s + 1 : s + 9] for s in starts])
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        assert record["loss"] == pytest.approx(loss.item(), abs=1e-3)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        assert record["grad_norm"] == pytest.approx(norm.item(), rel=1e-2)
        expected_lr = 1e-2 * record["step"] / 5 if record["step"] < 5 else None
        assert expected_lr is None or record["lr"] == pytest.approx(expected_lr)
        for group in optimizer.param_groups:
            group["lr"] = record["lr"]
        optimizer.step()


def test_microbatches_give_the_same_training(config, tmp_path):
    whole = train(dataclasses.replace(config, batch_size=8))
    split = train(dataclasses.replace(config, batch_size=8, microbatches=4, run_dir=tmp_path / "split"))
    for key in ("loss", "grad_norm", "valid_loss"):
        assert split[key] == pytest.approx(whole[key], rel=1e-3)


def test_bfloat16_trains_like_float32(config, tmp_path):
    exact = train(config)
    half = train(dataclasses.replace(config, precision="bfloat16", run_dir=tmp_path / "half"))
    assert half["loss"] == pytest.approx(exact["loss"], rel=0.03)
    assert half["loss"] != exact["loss"]
    state = read_checkpoint(checkpoints(tmp_path / "half")[-1])
    assert all(tensor.dtype == torch.float32 for tensor in state["model"].values())


def test_a_stopped_run_resumes_bit_for_bit(config, tmp_path, monkeypatch):
    train(dataclasses.replace(config, run_dir=tmp_path / "straight"))

    class PowerCutError(Exception):
        pass

    original = RunLog.write

    def write(self, records):
        if records[-1]["step"] == 15:
            raise PowerCutError
        original(self, records)

    monkeypatch.setattr(RunLog, "write", write)
    with pytest.raises(PowerCutError):
        train(config)
    monkeypatch.undo()
    with open(config.run_dir / "metrics.jsonl", "a") as file:
        file.write('{"step": 13, "loss": 0.0}\n{"step": 14, "lo')  # what a killed process may leave
    train(config)
    assert losses(config.run_dir) == losses(tmp_path / "straight")
    ours, straight = (read_checkpoint(checkpoints(run)[-1]) for run in (config.run_dir, tmp_path / "straight"))
    for name, tensor in straight["model"].items():
        assert torch.equal(tensor, ours["model"][name]), name


KILLED = """
import os, signal, sys
from pathlib import Path
from cs336_basics import checkpoint
from cs336_basics.model_config import ModelConfig
from cs336_basics.train_config import OptimizerConfig, TrainConfig
from cs336_basics.training import train

moment, data, run = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
kill = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
calls = 0

def kill_at_call(number, function):
    def wrapped(*arguments):
        global calls
        calls += 1
        if calls == number:
            kill()
        return function(*arguments)
    return wrapped

if moment == "while writing":
    def half(state, file):
        global calls
        calls += 1
        import io
        whole = io.BytesIO()
        save(state, whole)
        file.write(whole.getvalue()[: len(whole.getvalue()) // 2] if calls == 2 else whole.getvalue())
        if calls == 2:
            file.flush()
            kill()
    save, checkpoint.torch.save = checkpoint.torch.save, half
elif moment == "before the rename":
    checkpoint.os.fsync = kill_at_call(3, os.fsync)  # a checkpoint takes two: of the file and its folder
elif moment == "after the rename":
    checkpoint.sync = kill_at_call(2, checkpoint.sync)
train(TrainConfig(
    run_dir=run, train_data=data / "train.npy", valid_data=data / "valid.npy",
    model=ModelConfig(vocab_size=20, context_length=8, d_model=16, num_layers=1, num_heads=2),
    optimizer=OptimizerConfig(lr=1e-2, warmup_steps=5), steps=24, batch_size=4, device="cpu",
    log_every=3, eval_every=8, checkpoint_every=6, eval_sequences=None,
))
"""


@pytest.mark.parametrize("moment", ["while writing", "before the rename", "after the rename"])
def test_kill_minus_nine_at_any_moment(config, data, tmp_path, moment):
    command = [sys.executable, "-c", KILLED, moment, data, config.run_dir]
    assert subprocess.run(command, capture_output=True, check=False).returncode == -9
    unfinished = list((config.run_dir / "checkpoints").glob("*.tmp"))
    assert bool(unfinished) == (moment != "after the rename")
    train(config)
    train(dataclasses.replace(config, run_dir=tmp_path / "straight"))
    assert losses(config.run_dir) == losses(tmp_path / "straight")
    assert not list((config.run_dir / "checkpoints").glob("*.tmp"))


def test_ctrl_c_saves_first(config, tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    train(dataclasses.replace(config, run_dir=tmp_path / "straight"))
    original = AdamW.step
    steps = []

    def step(self):
        steps.append(1)
        if len(steps) == 10:  # in the middle of an update
            os.kill(os.getpid(), signal.SIGINT)
        return original(self)

    monkeypatch.setattr(AdamW, "step", step)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    assert checkpoints(config.run_dir)[-1].name == "step_00000010.pt"
    assert signal.getsignal(signal.SIGINT) is before
    monkeypatch.undo()
    train(config)
    assert losses(config.run_dir) == losses(tmp_path / "straight")


def test_a_complete_run_is_left_alone(config):
    train(config)
    metrics = config.run_dir / "metrics.jsonl"
    before = metrics.read_bytes(), checkpoints(config.run_dir)[-1].stat().st_mtime_ns
    latest = train(config)
    assert (metrics.read_bytes(), checkpoints(config.run_dir)[-1].stat().st_mtime_ns) == before
    assert latest["step"] == 24
    assert "valid_loss" in latest


def test_a_full_disk_stops_the_run_and_loses_nothing(config, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cs336_basics.checkpoint.os.fsync", full)
    with pytest.raises(OSError, match=r"step_00000006\.pt \(.*No space left on device\); free some space"):
        train(config)
    monkeypatch.undo()
    train(config)
    train(dataclasses.replace(config, run_dir=tmp_path / "straight"))
    assert losses(config.run_dir) == losses(tmp_path / "straight")


def test_a_damaged_checkpoint_is_named_and_the_one_before_takes_over_when_it_is_gone(config, tmp_path):
    train(dataclasses.replace(config, run_dir=tmp_path / "straight"))
    train(config)
    newest = checkpoints(config.run_dir)[-1]
    newest.write_bytes(newest.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"is damaged .*; delete it to resume from the checkpoint before it"):
        train(config)
    newest.unlink()
    train(config)
    assert losses(config.run_dir) == losses(tmp_path / "straight")


def test_another_configuration_does_not_resume(config):
    train(config)
    with pytest.raises(ValueError, match=r"a different configuration \(batch_size was 4, now 8; seed was 0, now 1\)"):
        train(dataclasses.replace(config, batch_size=8, seed=1))
    train(dataclasses.replace(config, log_every=5, keep_checkpoints=1))
    other = dataclasses.replace(config.optimizer, lr=0.5)
    with pytest.raises(ValueError, match=r"\(optimizer.lr was 0.01, now 0.5\)"):
        train(dataclasses.replace(config, optimizer=other))


def test_a_run_from_before_an_option_existed_resumes(config):
    """An option that the stored configuration does not name had its default."""
    straight = train(config)
    stored = json.loads((config.run_dir / "config.json").read_text())
    del stored["config"]["model"]["qk_norm"]
    (config.run_dir / "config.json").write_text(json.dumps(stored))
    assert train(config)["loss"] == straight["loss"]
    with pytest.raises(ValueError, match=r"\(model.qk_norm was False, now True\)"):
        train(dataclasses.replace(config, model=dataclasses.replace(config.model, qk_norm=True)))


def test_a_run_folder_with_older_names_and_removed_options_that_are_off_resumes(config):
    straight = train(config)
    path = config.run_dir / "config.json"
    stored = json.loads(path.read_text())
    old = stored["config"]
    old |= {"run": old.pop("run_dir"), "eval_windows": old.pop("eval_sequences")}
    old |= {"start_batch_size": None, "start_context": None}
    old["model"] |= {"logit_softcap": None, "value_embeddings": 0}
    path.write_text(json.dumps(stored))
    assert train(config)["loss"] == straight["loss"]
    assert read_model_config(config.run_dir) == MODEL
    old["model"]["value_embeddings"] = 1
    path.write_text(json.dumps(stored))
    for load in (lambda: train(config), lambda: read_model_config(config.run_dir)):
        with pytest.raises(ValueError, match="was trained with value_embeddings 1, which only experiments/leaderboard"):
            load()


@pytest.mark.parametrize("changes", [{"tie_embeddings": True, "qk_norm": True, "ffn": "relu2"}])
def test_other_models_train_and_resume(config, tmp_path, changes):
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))
    straight = train(dataclasses.replace(config, run_dir=tmp_path / "straight"))
    train(config)
    checkpoints(config.run_dir)[-1].unlink()
    assert train(config)["loss"] == straight["loss"]


@pytest.mark.parametrize("name", ["muon", "normuon"])
def test_other_optimizers_train_and_resume(config, tmp_path, name):
    options = dataclasses.replace(config.optimizer, name=name, decay_steps=10, min_lr=0.0)
    config = dataclasses.replace(config, optimizer=options)
    straight = train(dataclasses.replace(config, run_dir=tmp_path / "straight"))
    train(config)
    checkpoints(config.run_dir)[-1].unlink()
    assert train(config)["loss"] == straight["loss"]
    rates = [record["lr"] for record in read_metrics(config.run_dir / "metrics.jsonl") if "lr" in record]
    assert rates[4:15] == [1e-2] * 10 + [pytest.approx(0.9e-2)]
    assert rates[-1] == 0
    longer = train(dataclasses.replace(config, run_dir=tmp_path / "long", steps=150, batch_size=16))
    assert longer["valid_loss"] < 1.0


def test_a_run_that_failed_before_its_first_checkpoint_can_be_corrected(config):
    diverges = dataclasses.replace(config.optimizer, lr=1e30, warmup_steps=0)
    with pytest.raises(FloatingPointError):
        train(dataclasses.replace(config, optimizer=diverges))
    train(config)
    assert json.loads((config.run_dir / "config.json").read_text())["config"]["optimizer"]["lr"] == 0.01


def test_a_damaged_configuration_is_named(config):
    train(config)
    for text in ("{", "{}", '{"config": {"model": 3}}'):
        (config.run_dir / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r"config\.json is damaged"):
            train(config)
        with pytest.raises(ValueError, match=r"config\.json is damaged"):
            read_model_config(config.run_dir)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": dataclasses.replace(MODEL, vocab_size=19)}, r"train\.npy holds token id 19, .* vocabulary has 19"),
        ({"model": dataclasses.replace(MODEL, context_length=5000)}, "has 2000 tokens, but context length 5000"),
        ({"device": "cuda:99"}, "device 'cuda:99' cannot be used here"),
        ({"batch_size": 5, "microbatches": 5, "wandb_project": "x"}, "wandb is not installed"),
    ],
)
def test_bad_input_is_one_sentence(config, change, message):
    with pytest.raises(ValueError, match=message) as caught:
        train(dataclasses.replace(config, **change))
    assert "\n" not in str(caught.value)


def test_missing_data_is_named(config, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no token file .*absent\.npy; make it with"):
        train(dataclasses.replace(config, train_data=tmp_path / "absent.npy"))


def test_impossible_configurations_are_refused(config):
    for option in ("lr", "eps", "max_grad_norm", "decay_steps"):
        with pytest.raises(ValueError, match=f"{option} is -1"):
            OptimizerConfig(**{option: -1})
    for change in (
        {"steps": 0},
        {"batch_size": 4, "microbatches": 3},
        {"eval_sequences": 0},
        {"log_every": 0},
        {"seed": -1},
    ):
        with pytest.raises(ValueError, match=next(iter(change)) if len(change) == 1 else "does not split"):
            dataclasses.replace(config, **change)


def test_an_optimizer_is_its_line_in_the_table(monkeypatch):
    for name, choice in OPTIMIZERS.items():
        options = OptimizerConfig(name=name, momentum=0.7)
        optimizer = options.optimizer_class()([torch.nn.Parameter(torch.ones(2, 2))], **options.options())
        assert isinstance(optimizer, AdamW)
        assert all(optimizer.param_groups[0][option] == 0.7 for option in choice.more_options)
    monkeypatch.delitem(OPTIMIZERS, "muon")
    with pytest.raises(ValueError, match="optimizer 'muon' is unknown; choose one of adamw, normuon"):
        OptimizerConfig(name="muon")


def test_a_schedule_longer_than_the_run_is_refused(config):
    message = "warmup_steps 5 and decay_steps 21 do not fit into 24 steps; lower them too"
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, decay_steps=21))


def test_divergence_stops_the_run(config):
    options = dataclasses.replace(config.optimizer, lr=1e30, warmup_steps=0)
    with pytest.raises(FloatingPointError, match=r"diverged at step \d+: the loss is .* lower the learning rate"):
        train(dataclasses.replace(config, optimizer=options, steps=200, checkpoint_every=500, log_every=100))
    assert all(np.isfinite(record["loss"]) for record in read_metrics(config.run_dir / "metrics.jsonl"))
    assert read_metrics(config.run_dir / "metrics.jsonl")[0]["step"] == 1


def test_the_tokenizer_travels_with_the_run(config, data, tmp_path):
    from cs336_basics.tokenizer import Tokenizer

    Tokenizer({i: bytes([65 + i]) for i in range(20)}, []).save(tmp_path / "tokenizer")
    train(dataclasses.replace(config, tokenizer=tmp_path / "tokenizer"))
    assert (config.run_dir / "vocab.json").read_bytes() == (tmp_path / "tokenizer" / "vocab.json").read_bytes()
    Tokenizer({i: bytes([65 + i]) for i in range(21)}, []).save(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match="has 21 tokens, but the model's vocab_size is 20"):
        train(dataclasses.replace(config, run_dir=tmp_path / "other", tokenizer=tmp_path / "tokenizer"))
    shutil.rmtree(tmp_path / "tokenizer")
    with pytest.raises(FileNotFoundError, match=r"vocab\.json; name the folder"):
        train(dataclasses.replace(config, run_dir=tmp_path / "other", tokenizer=tmp_path / "tokenizer"))


def test_evaluation_is_the_mean_over_all_sequences(data):
    torch.manual_seed(0)
    model = BasicsTransformerLM.from_config(MODEL)
    tokens = np.load(data / "valid.npy")[:75]  # 9 sequences, and two tokens left over
    x = torch.from_numpy(tokens[:72].astype(np.int64)).reshape(9, 8)
    y = torch.from_numpy(tokens[1:73].astype(np.int64)).reshape(9, 8)
    expected = F.cross_entropy(model(x).flatten(0, 1), y.flatten()).item()
    for batch_size in (1, 4, 9, 100):
        assert evaluate(model, tokens, 8, batch_size) == pytest.approx(expected, rel=1e-5)
    for world_size in (2, 5, 20):  # ranks without sequences take part in every forward pass, but do not count
        forwards, shares = [], []
        for rank in range(world_size):
            calls = []
            counted = model.register_forward_hook(lambda *_, calls=calls: calls.append(1))
            one = SingleDevice("cpu")
            one.rank, one.world_size = rank, world_size
            shares.append(evaluate(model, tokens, 8, 2, strategy=one) / world_size)
            counted.remove()
            forwards.append(len(calls))
        assert sum(shares) == pytest.approx(expected, rel=1e-5)
        assert len(set(forwards)) == 1
    first = F.cross_entropy(model(x[:5]).flatten(0, 1), y[:5].flatten()).item()
    assert evaluate(model, tokens, 8, 2, max_sequences=5) == pytest.approx(first, rel=1e-5)


def test_ranks_share_the_batch_of_a_step(config):
    """Two ranks, run one after the other: their sequences are those of a single rank, without overlap."""

    class Half(SingleDevice):
        world_size = 2
        seen: list

        def __init__(self, rank):
            super().__init__("cpu")
            self.rank = rank

        @contextmanager
        def accumulate(self, model, *, last):
            yield

    seen = {}
    original = training.sequences_at
    for rank in (0, 1):
        starts = seen[rank] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                training, "sequences_at", lambda d, s, c, v, starts=starts: starts.append(s) or original(d, s, c, v)
            )
            patch.setattr(training, "evaluate", lambda *_: 0.0)
            train(dataclasses.replace(config, steps=2, microbatches=2, run_dir=config.run_dir / str(rank)), Half(rank))
    for step in (1, 2):
        parts = [seen[rank][2 * step - 2 : 2 * step] for rank in (0, 1)]
        mine, theirs = (np.concatenate(part) for part in parts)
        together = np.stack((mine, theirs), axis=1).ravel()
        assert together.tolist() == batch_starts(2000, 8, 4, 0, step).tolist()
    with pytest.raises(ValueError, match="does not split evenly over 2 ranks"):
        train(dataclasses.replace(config, batch_size=3), Half(0))


def test_devices():
    assert resolve_device("cpu") == torch.device("cpu")
    for name in ("abacus", "cuda:63"):
        with pytest.raises(ValueError, match=f"device '{name}' cannot be used here .* choose auto or cpu"):
            resolve_device(name)
