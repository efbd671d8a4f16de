"""Every way to train on two ranks against training on one."""

import dataclasses
import gc
import warnings
import weakref

import pytest
import torch

from cs336_basics.model import BasicsTransformerLM, ModelConfig
from cs336_basics.nn_utils import cross_entropy
from cs336_basics.optimizer import AdamW
from cs336_systems.instruments.ranks import optimizer_state_bytes, time_step
from cs336_systems.training.step import LEARNING_RATE, StepConfig, TrainingStep

MODEL = ModelConfig(67, 12, d_model=16, num_layers=2, num_heads=2, d_ff=24)
STEP = StepConfig(MODEL, torch.device("cpu"), batch_size=3)
STEPS = 3


def step(container, **parts):
    return dataclasses.replace(STEP, container=container, **parts)


#: Each must train as one rank does that has the whole batch.
EQUAL = {
    **{name: step(name) for name in ("naive", "flat", "overlapped", "torch-ddp", "fsdp")},
    **{name: step(name) for name in ("fsdp-linear", "fully-shard")},
    "bucketed": step("bucketed", bucket_mib=0.01),
    "checkpointing": step("bucketed", checkpointing="block"),
    "fsdp checkpointing": step("fsdp", checkpointing="block"),
    "fully-shard checkpointing": step("fully-shard", checkpointing="block"),
    "torch's AdamW": step("flat", optimizer="torch"),
    "ours": step("flat", sharding="ours"),
    "zero": step("flat", sharding="torch"),
    "ours, torch's AdamW": step("flat", optimizer="torch", sharding="ours"),
    "zero, torch's AdamW": step("flat", optimizer="torch", sharding="torch"),
    "fsdp, head with loss": step("fsdp", loss="torch"),
    "fully-shard, head with loss": step("fully-shard", loss="torch"),
}
OTHERS = {
    "none": step("none"),
    **{f"{name} bf16": step(name, precision="bfloat16") for name in ("fsdp", "fsdp-linear", "fully-shard", "bucketed")},
}


def train(rank):
    """For each configuration: losses, bytes of the optimizer's state, times, and whether all of it is freed."""
    warnings.simplefilter("ignore")  # PyTorch's own parts warn about each other
    found = {}
    for name, config in (EQUAL | OTHERS).items():
        step = TrainingStep(config, rank)
        losses = [step.full().item() for _ in range(STEPS)]
        held = [weakref.ref(x) for x in (step.module, *step.module.parameters())]
        found[name] = {"losses": losses, "state": optimizer_state_bytes(step.optimizer), "times": time_step(step)}
        del step
        gc.collect()
        found[name]["freed"] = not any(reference() is not None for reference in held)
    return found


@pytest.fixture(scope="module")
def trained(workers):
    return workers.run(train, 2, timeout_s=240)


def batch(rank):
    torch.manual_seed(1 + rank)
    return torch.randint(MODEL.vocab_size, (STEP.batch_size, MODEL.context_length + 1))


@pytest.fixture(scope="module")
def expected():
    """Losses of one rank that trains on the whole batch: those of its two halves, [steps][2]."""
    torch.manual_seed(0)
    model = BasicsTransformerLM.from_config(MODEL)
    optimizer = AdamW(model.parameters(), lr=LEARNING_RATE)
    halves = []
    for _ in range(STEPS):
        losses = [cross_entropy(model(ids[:, :-1]), ids[:, 1:]) for ids in (batch(0), batch(1))]
        halves.append([loss.item() for loss in losses])
        optimizer.zero_grad()
        (sum(losses) / 2).backward()
        optimizer.step()
    return halves


@pytest.mark.parametrize("name", EQUAL)
def test_two_ranks_train_like_one(name, trained, expected):
    both = [of_rank[name]["losses"] for of_rank in trained]
    torch.testing.assert_close(torch.tensor(both).T, torch.tensor(expected), rtol=1e-5, atol=1e-5)


def test_without_communication_they_drift_apart(trained, expected):
    both = torch.tensor([of_rank["none"]["losses"] for of_rank in trained]).T
    torch.testing.assert_close(both[0], torch.tensor(expected[0]))
    assert (both[-1] - torch.tensor(expected[-1])).abs().min() > 1e-4


@pytest.mark.parametrize("name", ["fsdp bf16", "fsdp-linear bf16", "bucketed bf16"])
def test_half_precision_equals_pytorchs(name, trained, expected):
    losses, theirs = (torch.tensor([one[which]["losses"] for one in trained]) for which in (name, "fully-shard bf16"))
    assert (losses - theirs).abs().max() < 2**-8 * theirs.max()
    assert (losses.T - torch.tensor(expected)).abs().max() < 2**-7 * theirs.max()
    assert (losses.diff() < 0).all()


def test_state_is_shared_out(trained):
    whole = trained[0]["bucketed"]["state"]
    for name in ("ours", "zero", "fsdp", "fully-shard"):
        shares = [of_rank[name]["state"] for of_rank in trained]
        assert sum(shares) == pytest.approx(whole, rel=0.02), name  # norms may be everywhere
        assert max(shares) < 0.7 * whole, name


def test_a_dropped_step_is_freed(trained):
    assert [name for of_rank in trained for name, found in of_rank.items() if not found["freed"]] == []


def test_times_add_up(trained):
    for found in trained[0].values():
        step, *parts = found["times"]
        assert min(parts) >= 0
        assert 0 < sum(parts) <= step


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="fsdp has sharded the optimizer's state already"):
        step("fsdp", sharding="ours")
    with pytest.raises(ValueError, match="cannot be compiled as a whole"):
        step("fsdp-linear", mode="compiled-blocks")
    with pytest.raises(ValueError, match="choose compiled-blocks"):
        step("bucketed", mode="compiled-model")
