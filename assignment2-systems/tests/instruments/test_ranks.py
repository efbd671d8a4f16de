"""Every way to train in two processes against training in one, and what the measurements share."""

import dataclasses
import gc
import statistics
import warnings
import weakref

import pytest
import torch
from torch._dynamo.utils import counters

from cs336_basics.model import BasicsTransformerLM, ModelConfig
from cs336_basics.nn_utils import cross_entropy
from cs336_basics.optimizer import AdamW
from cs336_systems.instruments.measure import OUT_OF_MEMORY, UNSUPPORTED
from cs336_systems.instruments.options.many_gpus import BenchDdp
from cs336_systems.instruments.ranks import (
    Marks,
    StepTimes,
    largest,
    measure_on_all_ranks,
    optimizer_state_bytes,
    summary,
    time_step,
)
from cs336_systems.parallel.collectives import all_gather_objects
from cs336_systems.training.blocks import blocks_of, compile_blocks
from cs336_systems.training.step import LEARNING_RATE, StepConfig, TrainingStep

MODEL = ModelConfig(67, 12, d_model=16, num_layers=2, num_heads=2, d_ff=24)
STEP = StepConfig(MODEL, torch.device("cpu"), batch_size=3)
STEPS = 3


def step(container, **parts):
    return dataclasses.replace(STEP, container=container, **parts)


#: Each must train as one process does that has the whole batch.
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


def train(process):
    """For each configuration: losses, bytes of the optimizer's state, times, and whether all of it is freed."""
    warnings.simplefilter("ignore")  # PyTorch's own parts warn of each other
    found = {}
    for name, config in (EQUAL | OTHERS).items():
        step = TrainingStep(config, process)
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
    """Losses on the whole batch in one process, [steps], and those of the two halves, [steps][2]."""
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
def test_two_processes_train_like_one(name, trained, expected):
    both = [of_process[name]["losses"] for of_process in trained]
    torch.testing.assert_close(torch.tensor(both).T, torch.tensor(expected), rtol=1e-5, atol=1e-5)


def test_without_communication_they_drift_apart(trained, expected):
    both = torch.tensor([of_process["none"]["losses"] for of_process in trained]).T
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
        shares = [of_process[name]["state"] for of_process in trained]
        assert sum(shares) == pytest.approx(whole, rel=0.02), name  # norms may be everywhere
        assert max(shares) < 0.7 * whole, name


def test_a_dropped_step_is_freed(trained):
    assert [name for of_process in trained for name, found in of_process.items() if not found["freed"]] == []


def test_times_add_up(trained):
    for found in trained[0].values():
        step, *parts = found["times"]
        assert min(parts) >= 0
        assert 0 < sum(parts) <= step


def unlucky(process, kind):
    def measure():
        if kind == "memory":
            raise torch.OutOfMemoryError("no memory left")
        if kind == "alone" and process.rank == 1:
            raise RuntimeError("it broke")
        return {"rank": process.rank}

    return measure_on_all_ranks(measure), all_gather_objects(process.rank)


@pytest.mark.parametrize(
    ("kind", "status", "rows"),
    [
        ("nothing", {"status": "ok"}, [{"status": "ok", "rank": 0}, {"status": "ok", "rank": 1}]),
        ("memory", {"status": OUT_OF_MEMORY}, []),
        ("alone", {"status": UNSUPPORTED, "reason": "RuntimeError: it broke"}, []),
    ],
)
def test_all_processes_agree_on_a_failure(kind, status, rows, workers):
    assert workers.run(unlucky, 2, kind) == [((status, rows), [0, 1])] * 2


def test_the_slowest_process_counts():
    fast = [StepTimes(1.0, 0.5, 0.25, 0.125)] * 3
    slow = [StepTimes(float(step), 1.0, 2.0, 3.0) for step in (4, 9, 5)]
    assert summary([fast, slow]) == {
        "step_ms": 5, "paced_ms": 5, "mean_ms": 6, "std_ms": statistics.stdev([4, 9, 5]),
        "forward_backward_ms": 1, "after_backward_ms": 2, "optimizer_ms": 3,
    }  # fmt: skip
    assert summary([fast[:1]])["std_ms"] == 0


def test_paced_steps_are_as_long_as_their_slowest_process():
    one, other = ([StepTimes(step, 0.0, 0.0, 0.0) for step in steps] for steps in ((5.0, 1.0, 1.0), (1.0, 4.0, 3.0)))
    assert summary([one, other])["step_ms"] == 3
    assert summary([one, other])["paced_ms"] == 4


def test_largest():
    assert largest([{"a": 1.0}, {"a": 3.0}, {"a": 2.0}], "a") == {"a": 3.0}
    assert largest([{"a": None}, {}], "a") == {}


def test_marks_are_in_order():
    marks = Marks(torch.device("cpu"))
    for _ in range(4):
        marks.mark()
    assert len(marks.between_ms()) == 3
    assert min(marks.between_ms()) >= 0


def test_blocks_are_compiled_once_and_compute_the_same():
    torch.manual_seed(0)
    ids = torch.randint(67, (2, 12))
    counters.clear()
    for _ in range(2):
        model = BasicsTransformerLM.from_config(MODEL)
        names, expected = list(model.state_dict()), model(ids)
        compile_blocks(*blocks_of(model), backend="aot_eager")
        torch.testing.assert_close(model(ids), expected)
        model(ids).sum().backward()
        assert list(model.state_dict()) == names
    assert counters["stats"]["unique_graphs"] == 1


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="fsdp has sharded the optimizer's state already"):
        step("fsdp", sharding="ours")
    with pytest.raises(ValueError, match="cannot be compiled as a whole"):
        step("fsdp-linear", mode="compiled-blocks")
    with pytest.raises(ValueError, match="choose compiled-blocks"):
        step("bucketed", mode="compiled-model")


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"processes": 0}, "--processes is 0"),
        ({"steps": 0}, "--steps is 0"),
        ({"warmup": -1}, "--warmup is -1"),
        ({"device": "cuda", "processes": 99}, "each needs a GPU, but torch sees"),
        ({"device": "mps"}, "choose auto, cuda or cpu"),
        ({"rounds": 0}, "--rounds is 0"),
        ({"bucket_mib": (1, 0)}, "a bucket of 0 MiB"),
        ({"variants": ()}, "nothing to measure"),
        ({"attention": "sdpa-cudnn"}, "needs an NVIDIA GPU"),
    ],
)
def test_mistakes_are_one_sentence(wrong, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        BenchDdp(**({"device": "cpu", "processes": 2, "size": "tiny", "out": tmp_path} | wrong)).execute()
    assert not list(tmp_path.iterdir())
