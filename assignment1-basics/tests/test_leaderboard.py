"""The leaderboard's ladder, and the options that it tried and dropped."""

import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from experiments import models, sweep
from experiments.leaderboard import ladder
from experiments.leaderboard.config import LeaderboardConfig, LeaderboardModelConfig
from experiments.leaderboard.model import LeaderboardLM, softcap, train
from experiments.models import BEST_LR
from experiments.results import RESULTS, read_result, result_path

from cs336_basics import training
from cs336_basics.checkpoint import checkpoints
from cs336_basics.data import write_tokens
from cs336_basics.generation import generate
from cs336_basics.model import BasicsTransformerLM
from cs336_basics.model_config import ModelConfig, SamplingConfig
from cs336_basics.muon import Muon
from cs336_basics.presets import TRAIN
from cs336_basics.run_folder import read_metrics
from cs336_basics.train_config import OptimizerConfig, TrainConfig, read_model_config

TINY = ModelConfig(50, 8, 16, 1, 2, 16)
SHAPE = {"vocab_size": 97, "context_length": 24, "d_model": 32, "num_layers": 3, "num_heads": 4, "d_ff": 48}


def build(**changes):
    torch.manual_seed(0)
    return LeaderboardLM.from_config(LeaderboardModelConfig(**SHAPE, **changes))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    rng = np.random.default_rng(0)
    for name in ("train", "valid"):
        write_tokens(folder / f"{name}.npy", [rng.integers(50, size=2000)], 50)
    return folder


@pytest.fixture
def config(data, tmp_path):
    return LeaderboardConfig.of(
        TrainConfig(
            run_dir=tmp_path / "run", train_data=data / "train.npy", valid_data=data / "valid.npy", model=TINY,
            optimizer=OptimizerConfig(lr=1e-2, warmup_steps=5), steps=24, batch_size=4, device="cpu",
            log_every=3, eval_every=8, checkpoint_every=6, eval_sequences=None,
        )
    )  # fmt: skip


def test_without_its_options_it_is_the_plain_model():
    torch.manual_seed(0)
    plain, ids = BasicsTransformerLM.from_config(ModelConfig(**SHAPE)), torch.randint(97, (2, 19))
    assert list(build().state_dict()) == list(plain.state_dict())
    assert torch.equal(build()(ids), plain(ids))


def test_the_soft_cap_bends_the_logits_and_nothing_else():
    assert softcap(torch.tensor([1e9, -1e9, 0.0]), 30.0).tolist() == [30.0, -30.0, 0.0]
    plain, ids = build(), torch.randint(97, (2, 19))
    capped = build(logit_softcap=0.5)
    capped.load_state_dict(plain.state_dict())
    logits = plain(ids)
    assert logits.abs().max() > 0.6
    torch.testing.assert_close(capped(ids), 0.5 * (logits / 0.5).tanh())
    torch.testing.assert_close(capped.hidden_states(ids), plain.hidden_states(ids), rtol=0, atol=0)


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_value_embeddings_are_added_to_the_values_of_the_last_blocks(norm):
    plain, ids = build(norm=norm), torch.randint(97, (2, 19))
    model = build(value_embeddings=2, norm=norm)
    missing = model.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert missing == ["value_embeddings.0.weight", "value_embeddings.1.weight"]
    torch.testing.assert_close(model(ids), plain(ids), rtol=0, atol=0)  # they start at zero

    for table in model.value_embeddings:
        torch.nn.init.normal_(table.weight)
    for layer, table in zip(plain.layers[1:], model.value_embeddings, strict=True):
        layer.attn.v_proj.register_forward_hook(lambda _, __, values, table=table: values + table.weight[ids])
    torch.testing.assert_close(model(ids), plain(ids))
    with pytest.raises(ValueError, match="value_embeddings is 4, but there are 3 blocks"):
        build(value_embeddings=4)


def test_a_token_depends_only_on_those_before_it():
    model = build(logit_softcap=3.0, value_embeddings=1)
    embeddings = []
    model.token_embeddings.register_forward_hook(lambda _m, _i, out: embeddings.append(out.requires_grad_()))
    logits = model(torch.randint(97, (1, 12)))
    for position in (0, 4, 11):
        (gradient,) = torch.autograd.grad(logits[0, position].sum(), embeddings[0], retain_graph=True)
        influence = gradient[0].abs().sum(-1)
        assert (influence[: position + 1] > 0).all()
        assert (influence[position + 1 :] == 0).all()


@pytest.mark.parametrize(
    "changes", [{"qk_norm": True, "tie_embeddings": True, "logit_softcap": 5.0}, {"value_embeddings": 1}]
)
def test_the_cache_works_for_every_option(changes):
    model = build(**changes)
    for table in model.value_embeddings:
        torch.nn.init.normal_(table.weight)
    prompts, greedy = [[1, 2, 3], [4]], SamplingConfig(max_new_tokens=24, temperature=0)
    assert generate(model, prompts, greedy) == generate(model, prompts, greedy, use_cache=False)


def test_muon_leaves_the_tables_to_adamw():
    model = build(value_embeddings=1)
    matrices, rest = Muon.groups(model)
    assert len(matrices["params"]) + len(rest["params"]) == len(list(model.parameters()))
    assert any(parameter is model.value_embeddings[0].weight for parameter in rest["params"])


@pytest.mark.parametrize(
    "changes",
    [{"tie_embeddings": True, "qk_norm": True, "ffn": "relu2", "logit_softcap": 15.0}, {"value_embeddings": 1}],
)
def test_its_models_train_and_resume(config, tmp_path, changes):
    config = replace(config, model=replace(config.model, **changes))
    straight = train(replace(config, run_dir=tmp_path / "straight"))
    train(config)
    checkpoints(config.run_dir)[-1].unlink()
    assert train(config)["loss"] == straight["loss"]


def test_the_package_alone_refuses_its_runs_and_loads_those_with_the_options_off(config):
    plain = TrainConfig(**{name: getattr(config, name) for name in TrainConfig.__dataclass_fields__} | {"model": TINY})
    train(config)
    assert read_model_config(config.run_dir) == TINY
    assert training.train(plain)["step"] == 24  # the same run: it is complete
    capped = replace(config, run_dir=config.run_dir / "capped", model=replace(config.model, logit_softcap=15.0))
    train(capped)
    with pytest.raises(ValueError, match=r"was trained with logit_softcap 15\.0, which only experiments/leaderboard"):
        read_model_config(capped.run_dir)
    grows = replace(config, run_dir=config.run_dir / "grows", start_batch_size=1)
    train(grows)
    with pytest.raises(ValueError, match=r"was trained with start_batch_size 1, which only experiments/leaderboard"):
        training.train(replace(plain, run_dir=grows.run_dir))


def test_growth_of_batch_and_context(config, tmp_path):
    grows = replace(config, start_batch_size=1, start_context=2, microbatches=1)
    shapes = [grows.batch_shape(step) for step in range(1, 25)]
    assert shapes == [(4, 2)] * 8 + [(4, 4)] * 8 + [(4, 8)] * 8  # the batch doubles when the context does
    assert [replace(grows, start_context=None).batch_shape(step) for step in (1, 8, 9, 16, 17, 24)] == [
        (1, 8), (1, 8), (2, 8), (2, 8), (4, 8), (4, 8),
    ]  # fmt: skip
    batches = []
    real = training.sequences_at
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "sequences_at", lambda *a: batches.append(real(*a)[0].shape) or real(*a))
        patch.setattr(training, "evaluate", lambda *_: 0.0)
        train(grows)
    assert [tuple(shape) for shape in batches] == shapes
    records = [record for record in read_metrics(grows.run_dir / "metrics.jsonl") if "tokens" in record]
    assert [record["tokens"] for record in records] == np.cumsum([a * b for a, b in shapes]).tolist()

    straight = train(replace(grows, run_dir=tmp_path / "straight"))
    for path in checkpoints(grows.run_dir):
        path.unlink()
    train(grows)
    checkpoints(grows.run_dir)[-1].unlink()
    assert train(grows)["loss"] == straight["loss"]
    assert straight["tokens"] == records[-1]["tokens"]
    for changes, message in (
        ({"start_batch_size": 3}, "start_batch_size is 3, but must be 4 divided by a power of two"),
        ({"start_context": 16}, "start_context is 16, but must be 8 divided"),
        ({"start_batch_size": 1, "microbatches": 2}, "start_batch_size 1 does not split into 2 equal microbatches"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(config, **changes)


COUNT_COMPILED = """
import functools, pickle, sys, torch
from experiments.leaderboard.model import train

calls = []
def counting(graph, _):
    return lambda *arguments: calls.append(graph) or graph(*arguments)

torch.compile = functools.partial(torch.compile, backend=counting)
train(pickle.loads(bytes.fromhex(sys.argv[1])))
print("compiled", len({*calls}), len(calls))
"""


def test_every_shape_of_a_growing_batch_is_compiled(config):
    """Beyond its limit torch.compile runs code uncompiled, and says so only in a log."""
    grows = replace(config, batch_size=512, start_batch_size=1, compile=True, steps=20, eval_every=20)
    command = [
        sys.executable,
        "-c",
        COUNT_COMPILED,
        pickle.dumps(grows).hex(),
    ]  # in this process shapes are checked too
    root = Path(__file__).parent.parent
    output = subprocess.run(command, check=True, capture_output=True, text=True, cwd=root).stdout
    graphs, calls = map(int, output.split("compiled ")[1].split())
    assert graphs >= 2 * 10  # the model and the loss, for batches of 1 to 512
    assert calls >= 2 * 20  # in each step


def test_leaderboard_keeps_what_helps_and_goes_on(data, tmp_path, monkeypatch, capsys):
    tiny = replace(TRAIN["owt"][1], model=TINY, compile=False, precision="float32", batch_size=8)
    monkeypatch.setitem(models.TRAIN, "owt", ("tiny", tiny))
    changes = {
        "rate of zero": {"lr x": 0.0},
        "wider": {"model.d_model": 32},
        "half the batch, growing": {"batch_size x": 0.5, "start_batch_size x": 0.5},
        "as it is": {"model.norm": "pre"},
    }
    monkeypatch.setattr(ladder, "LADDER", changes)
    monkeypatch.setattr(ladder, "FINALS", {"larger": {"model.num_layers": 2}})
    losses = {"baseline": 3.0, "rate of zero": 2.998, "wider": 2.9, "half the batch, growing": 3.0}
    real = ladder.run_here

    def with_that_loss(run, *where):
        return {**real(run, *where), "valid_loss": losses.get(run.name), "status": "finished"}

    monkeypatch.setattr(ladder, "run_here", with_that_loss)
    # As many steps on every machine: the clock has a test of its own.
    monkeypatch.setattr(sweep, "_as_many_steps_as_fit", lambda run, *_: sweep.stretched(run.config, sweep.PROBE_STEPS))
    setting = ladder.Leaderboard(data, 1.5, 1.5, device="cpu", runs=tmp_path / "runs", out=tmp_path)
    setting.execute()
    rows = {row["name"]: row for row in read_result("leaderboard", tmp_path)["rows"]}
    assert [*rows] == [*losses]  # what changes nothing is not run
    assert "kept: wider" in capsys.readouterr().out
    assert rows["wider"]["config"]["optimizer"]["lr"] == BEST_LR
    last = rows["half the batch, growing"]["config"]
    assert (last["model"]["d_model"], last["batch_size"], last["start_batch_size"]) == (32, 4, 2)
    assert all(row["steps_done"] == row["config"]["steps"] == sweep.PROBE_STEPS for row in rows.values())

    before = result_path("leaderboard", tmp_path).read_text()
    replace(setting, finals=("larger", "baseline")).execute()
    assert result_path("leaderboard", tmp_path).read_text() == before
    finals = read_result("leaderboard_finals", tmp_path)["rows"]
    assert [row["config"]["model"]["d_model"] for row in finals] == [32, 16]
    with pytest.raises(ValueError, match="no final 'best'; there are baseline, larger"):
        replace(setting, finals=("best",))


def test_the_ladder_and_the_finals_are_those_of_the_results(monkeypatch):
    """Every run that the recorded losses lead to is found in the results, with the same configuration."""

    def recorded(run, *_):
        rows = sweep._rows(run.problem, RESULTS)
        return next(row for row in rows if sweep._is_the_row(run, row))

    monkeypatch.setattr(ladder, "run_here", recorded)
    setting = ladder.Leaderboard(finals=("baseline", *ladder.FINALS))
    setting.execute()
    best = setting.climb(ladder.Recipe(setting.baseline()))
    assert best.config.optimizer.name == "normuon"
    assert best.config.start_context == best.config.model.context_length // 4


def test_every_recorded_model_is_found_again():
    setting = models.TrainModels()
    for problem, runs in models.PROBLEMS.items():
        rows = sweep._rows(problem, RESULTS)
        assert [run.name for run in runs(setting) if not sweep._is_done(run, rows)] == []
