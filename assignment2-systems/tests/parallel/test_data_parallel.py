"""Every container trains as one process does on the whole batch; how and when gradients travel."""

import copy
import gc
from contextlib import nullcontext
from functools import partial
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from cs336_basics.model import Embedding, Linear, TransformerBlock
from cs336_basics.nn_utils import clip_gradient
from cs336_basics.optimizer import AdamW
from cs336_systems.parallel import (
    FSDP,
    BucketedDataParallel,
    FlatDataParallel,
    NaiveDataParallel,
    OverlappedDataParallel,
)
from cs336_systems.parallel.process_group import Rank
from tests.toy_models import (
    OPTIMIZERS,
    assert_same,
    gradients_of,
    language,
    parameters_of,
    part,
    spoiled,
    toy,
    train_alone,
    train_together,
)
from tests.workers import recorded_collectives

AFTER_BACKWARD = {"naive": NaiveDataParallel, "flat": FlatDataParallel}
DURING_BACKWARD = {
    "overlapped": OverlappedDataParallel,
    "bucketed": BucketedDataParallel,
    "small buckets": partial(BucketedDataParallel, bucket_size_mib=0.001),
    "one bucket": partial(BucketedDataParallel, bucket_size_mib=None),
}
REPLICATED = AFTER_BACKWARD | DURING_BACKWARD
SHARDED = {"FSDP": FSDP, "FSDP of blocks": partial(FSDP, unit_classes=(TransformerBlock, Linear, Embedding))}
ALL = REPLICATED | SHARDED

replicated = pytest.mark.parametrize("wrap", REPLICATED.values(), ids=REPLICATED)
everyone = pytest.mark.parametrize("wrap", ALL.values(), ids=ALL)


def check_training(process, problem, wrap, optimizer, dtype, tolerance):
    problem = problem(dtype, rows=2 * process.world_size)
    alone = train_alone(problem, OPTIMIZERS[optimizer])
    together = train_together(process, problem, wrap, OPTIMIZERS[optimizer])
    for ours, theirs in zip(together, alone, strict=True):
        assert_same(ours, theirs, tolerance)


@everyone
@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("optimizer", ["our AdamW", "torch's AdamW", "momentum"])
def test_equals_one_process_with_the_whole_batch(workers, world_size, wrap, optimizer):
    workers.run(check_training, world_size, toy, wrap, optimizer, torch.float64, 1e-10)


@everyone
@pytest.mark.parametrize("world_size", [2, 3])
def test_a_language_model_equals_one_process_with_the_whole_batch(workers, world_size, wrap):
    workers.run(check_training, world_size, language, wrap, "our AdamW", torch.float64, 1e-10)


@everyone
@pytest.mark.parametrize(("problem", "optimizer"), [(toy, "momentum"), (language, "AdamW with large eps")])
def test_equals_one_process_in_float32(workers, wrap, problem, optimizer):
    workers.run(check_training, 2, problem, wrap, optimizer, torch.float32, 1e-6)


def check_subgroups(process, wrap):
    dist.barrier()
    groups = [dist.new_group([0]), dist.new_group([1, 2])]
    inner = Rank(0, 1, process.device) if process.rank == 0 else Rank(process.rank - 1, 2, process.device)
    problem = toy(torch.float64, rows=4, steps=2)
    alone = train_alone(problem, OPTIMIZERS["momentum"])
    together = train_together(
        inner, problem, partial(wrap, group=groups[process.rank > 0]), OPTIMIZERS["momentum"]
    )  # fmt: skip
    assert_same(together[-1], alone[-1], 1e-10)


@everyone
def test_groups_train_apart(workers, wrap):
    workers.run(check_subgroups, 3, wrap)


def check_start(process, wrap):
    model = toy(torch.float32, 4).model
    ours = spoiled(process, model)
    for each, rank in ((model, 0), (ours, process.rank)):
        each.register_buffer("steps", torch.tensor(rank))
        each.register_buffer("mask", torch.tensor([True, rank > 0]))
    expected = model.state_dict()
    wrapped = wrap(ours)
    assert wrapped.module is ours
    assert_same(dict(ours.state_dict()), expected)
    assert [name for name, _ in wrapped.named_parameters()] == [f"module.{name}" for name, _ in ours.named_parameters()]


@replicated
def test_all_start_as_process_0(workers, wrap):
    workers.run(check_start, 2, wrap)


def check_accumulation(process, wrap):
    problem = toy(torch.float64, rows=6 * process.world_size)
    inputs, targets = problem.batches[0]
    model = wrap(copy.deepcopy(problem.model))
    micro_batches = list(zip(part(process, inputs).chunk(3), part(process, targets).chunk(3)))
    with recorded_collectives() as calls, model.no_sync():
        for x, y in micro_batches[:-1]:
            (problem.loss(model, x, y) / 3).backward()
    assert {name for name, *_ in calls} <= {"all_gather"}  # FSDP's weights, but no gradients
    x, y = micro_batches[-1]
    (problem.loss(model, x, y) / 3).backward()
    model.finish_gradient_synchronization()

    problem.loss(problem.model, inputs, targets).backward()
    assert_same(gradients_of(model), gradients_of(problem.model), 1e-12)


@everyone
def test_gradient_accumulation_without_messages(workers, wrap):
    workers.run(check_accumulation, 2, wrap)


def check_two_backward_passes(process, wrap):
    problem = toy(torch.float64, rows=4 * process.world_size)
    inputs, targets = problem.batches[0]
    model = wrap(copy.deepcopy(problem.model))
    for x, y in zip(part(process, inputs).chunk(2), part(process, targets).chunk(2)):
        (problem.loss(model, x, y) / 2).backward()
    model.finish_gradient_synchronization()

    problem.loss(problem.model, inputs, targets).backward()
    assert_same(gradients_of(model), gradients_of(problem.model), 1e-12)


BOTH_TIMES = AFTER_BACKWARD | SHARDED


@pytest.mark.parametrize("wrap", BOTH_TIMES.values(), ids=BOTH_TIMES)
def test_two_backward_passes_before_the_end(workers, wrap):
    workers.run(check_two_backward_passes, 2, wrap)


def check_error_at_second_backward_pass(process, wrap, under_no_sync):
    problem = toy(torch.float64, rows=4)
    model = wrap(problem.model)
    problem.loss(model, *problem.batches[0]).backward()
    with (
        model.no_sync() if under_no_sync else nullcontext(),
        pytest.raises(RuntimeError, match=r"second backward pass .* finish_gradient_synchronization"),
    ):
        problem.loss(model, *problem.batches[1]).backward()


@pytest.mark.parametrize("under_no_sync", [False, True])
@pytest.mark.parametrize("wrap", DURING_BACKWARD.values(), ids=DURING_BACKWARD)
def test_a_second_backward_pass_would_change_what_is_under_way(workers, wrap, under_no_sync):
    workers.run(check_error_at_second_backward_pass, 2, wrap, under_no_sync)


class Branches(nn.Module):
    """Of four maps, those in `path` are applied, one after the other."""

    def __init__(self):
        super().__init__()
        self.maps = nn.ModuleDict({name: Linear(4, 4) for name in "abcd"})

    def forward(self, x, path):
        for name in path:
            x = torch.tanh(self.maps[name](x))
        return x


# What processes 0, 1, ... use, in each step: gradients come in another order, or on one process only; none for d.
PATHS = [("abc", "cba", "bac"), ("a", "b", "c"), ("ac", "c", ""), ("", "b", ""), ("c", "a", "b")]


def check_branches(process, wrap):
    model = Branches().double()
    alone, together = copy.deepcopy(model), wrap(copy.deepcopy(model))
    optimizers = [AdamW(m.parameters(), lr=0.1, weight_decay=0.1) for m in (alone, together)]
    for paths in PATHS:
        paths = paths[: process.world_size]
        x = torch.randn(process.world_size, 2, 4, dtype=torch.float64)
        for optimizer in optimizers:
            optimizer.zero_grad()
        losses = [alone(rows, path).square().mean() for rows, path in zip(x, paths) if path]
        (sum(losses) / process.world_size).backward()
        if paths[process.rank]:  # a process without rows does nothing
            together(x[process.rank], paths[process.rank]).square().mean().backward()
        together.finish_gradient_synchronization()
        assert_same(gradients_of(together), gradients_of(alone), 1e-12)
        for optimizer in optimizers:
            optimizer.step()
    assert together.module.maps["d"].weight.grad is None
    assert_same(parameters_of(together), parameters_of(alone), 1e-12)
    assert torch.equal(together.module.maps["d"].weight, model.maps["d"].weight)  # nor does it decay


@replicated
@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_that_use_different_parameters(workers, world_size, wrap):
    workers.run(check_branches, world_size, wrap)


def check_uneven_rows(process, wrap, rows):
    problem = toy(torch.float64, rows=sum(rows))
    inputs, targets = problem.batches[0]
    model = wrap(copy.deepcopy(problem.model))
    x, y = (rows_of_all.split(rows)[process.rank] for rows_of_all in (inputs, targets))
    weight = model.loss_weight(len(x))
    loss = problem.loss(model, x, y) if len(x) else model(x).sum()  # zero, but all units of FSDP have run
    (weight * loss).backward()
    model.finish_gradient_synchronization()

    problem.loss(problem.model, inputs, targets).backward()
    assert_same(gradients_of(model), gradients_of(problem.model), 1e-12)


@everyone
@pytest.mark.parametrize("rows", [[5, 3], [3, 0], [1, 4, 1]])
def test_weighted_losses_of_uneven_rows(workers, wrap, rows):
    workers.run(check_uneven_rows, len(rows), wrap, rows)


def check_clipping(process, wrap, max_norm):
    problem = toy(torch.float64, rows=2 * process.world_size)
    inputs, targets = problem.batches[0]
    model = wrap(copy.deepcopy(problem.model))
    problem.loss(model, part(process, inputs), part(process, targets)).backward()
    model.finish_gradient_synchronization()
    norm = model.clip_gradient(max_norm)

    problem.loss(problem.model, inputs, targets).backward()
    expected = clip_gradient(problem.model.parameters(), max_norm)
    torch.testing.assert_close(norm, expected, atol=1e-12, rtol=0)
    assert_same(gradients_of(model), gradients_of(problem.model), 1e-12)


@everyone
@pytest.mark.parametrize("max_norm", [0.01, 1e6])
def test_clipping_by_the_norm_of_the_whole_gradient(workers, wrap, max_norm):
    workers.run(check_clipping, 3, wrap, max_norm)


class Numbers(nn.Module):
    """Parameters of given sizes and dtypes, used in their order."""

    def __init__(self, *sizes, dtypes=()):
        super().__init__()
        dtypes = dtypes or [torch.float32] * len(sizes)
        self.numbers = nn.ParameterList(torch.ones(size, dtype=dtype) for size, dtype in zip(sizes, dtypes))

    def forward(self):
        return sum(parameter.double().sum() for parameter in self.numbers)


def messages_of(process, wrap, model):
    """Dtype and elements of the messages with gradients."""
    wrapped = wrap(model)
    with recorded_collectives() as calls:
        wrapped().backward()
        wrapped.finish_gradient_synchronization()
    *gradients, _ = calls  # at last, which parameters have any
    return [(dtype, elements) for _, dtype, elements in gradients]


KB = 1 / 1024


@pytest.mark.parametrize(
    ("bucket_size_mib", "messages"),
    [
        (None, [1000]),
        (25, [1000]),
        (1.75 * KB, [100, 400, 300, 200]),  # 448 elements; each bucket ends where the next gradient does not fit
        (2.5 * KB, [500, 500]),  # 640 elements
        (2000 / 2**20, [500, 500]),  # just so
        (1999 / 2**20, [100, 400, 300, 200]),
        (1e-9, [100, 400, 300, 200]),  # smaller than any gradient
    ],
)
def test_buckets_fill_from_the_last_parameter(workers, bucket_size_mib, messages):
    wrap = partial(BucketedDataParallel, bucket_size_mib=bucket_size_mib)
    for sent in workers.run(messages_of, 2, wrap, Numbers(200, 300, 400, 100)):
        assert sent == [(torch.float32, elements) for elements in messages]


MIXED = Numbers(1, 2, 3, 4, dtypes=[torch.float32, torch.float64, torch.float64, torch.float32])


@pytest.mark.parametrize(
    ("wrap", "elements"),
    [
        (NaiveDataParallel, [1, 2, 3, 4]),
        (FlatDataParallel, [5, 5]),
        (OverlappedDataParallel, [4, 3, 2, 1]),
        (BucketedDataParallel, [4, 5, 1]),
    ],
)
def test_a_message_has_one_dtype(workers, wrap, elements):
    for sent in workers.run(messages_of, 2, wrap, MIXED):
        assert [numel for _, numel in sent] == elements
        assert {dtype for dtype, _ in sent} == {torch.float32, torch.float64}


@pytest.mark.parametrize("size", [0, -1.0])
def test_a_bucket_holds_something(size):
    with pytest.raises(ValueError, match="must be positive"):
        BucketedDataParallel(nn.Linear(1, 1), size)


class Transposed(nn.Module):
    """Its weight is not contiguous, and so neither is the gradient."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.arange(12.0).view(3, 4).T)

    def forward(self, x):
        return (self.weight * x).sum()


def check_not_contiguous(process, wrap):
    model = Transposed()
    if process.rank:
        model.weight.data += 1
    model = wrap(model)
    assert torch.equal(model.module.weight, torch.arange(12.0).view(3, 4).T)
    x = torch.randn(process.world_size, 4, 3)
    model(x[process.rank]).backward()
    assert process.world_size == 2
    model.finish_gradient_synchronization()
    assert torch.equal(model.module.weight.grad, (x[0] + x[1]) / 2)


@replicated
def test_gradients_that_are_not_contiguous(workers, wrap):
    workers.run(check_not_contiguous, 2, wrap)


def check_nothing_to_train(process, wrap):
    model = wrap(Linear(3, 3).requires_grad_(False))
    model(torch.ones(3))
    model.finish_gradient_synchronization()
    assert model.clip_gradient(1.0) == 0


@everyone
def test_nothing_to_train(workers, wrap):
    workers.run(check_nothing_to_train, 2, wrap)


def build(process, wrap, models):
    with pytest.raises(ValueError, match="the ranks have different modules") as error:
        wrap(models[process.rank])
    return str(error.value)


FROZEN = nn.Linear(2, 2)
FROZEN.weight.requires_grad_(False)


@pytest.mark.parametrize(
    ("wrap", "other", "message"),
    [
        (NaiveDataParallel, nn.Linear(2, 3), "rank 1 has parameter weight (3, 2) torch.float32"),
        (OverlappedDataParallel, FROZEN, "rank 1 has parameter weight (2, 2) torch.float32 frozen"),
        (BucketedDataParallel, nn.Linear(2, 2).double(), "torch.float64"),
        (FSDP, nn.Linear(2, 2, bias=False), "rank 1 has nothing"),
        (FlatDataParallel, nn.BatchNorm1d(2), "buffer running_mean"),
    ],
)
def test_processes_with_different_modules(workers, wrap, other, message):
    norm = nn.BatchNorm1d(2, track_running_stats=False)
    first = norm if isinstance(other, nn.BatchNorm1d) else nn.Linear(2, 2)
    for error in workers.run(build, 2, wrap, [first, other], timeout_s=30):
        assert message in error


def started_messages(process, wrap):
    """How many of the messages with gradients started before the last operation of the backward pass, and how many."""
    problem = language(torch.float32, 2 * process.world_size)
    model = wrap(problem.model)
    x, y = (part(process, rows) for rows in problem.batches[0])
    problem.loss(model, x, y).backward()  # lets FSDP know the order of the units
    model.finish_gradient_synchronization()
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiled:
        loss = problem.loss(model, x, y)
        with record_function("backward pass"):
            loss.backward()
        model.finish_gradient_synchronization()
    events = sorted(profiled.events(), key=lambda event: event.time_range.start)
    backward = next(event.time_range for event in events if event.name == "backward pass")
    names = ("c10d::_reduce_scatter_base_",) if isinstance(model, FSDP) else ("c10d::allreduce_coalesced_",)
    messages = [event.time_range.start for event in events if event.name in names]
    last_product = max(
        event.time_range.start for event in events if event.name == "aten::mm" and event.time_range.start < backward.end
    )
    return sum(start < last_product for start in messages), len(messages)


@everyone
def test_messages_start_during_the_backward_pass(workers, wrap):
    for during, total in workers.run(started_messages, 2, wrap):
        if wrap in AFTER_BACKWARD.values():
            assert during == 0
        elif wrap in (BucketedDataParallel, DURING_BACKWARD["one bucket"]):
            assert total == 2  # of one bucket, and which parameters have gradients
        else:
            assert 2 <= during < total


def check_shrinking_buckets(process, sizes, expected):
    with mock.patch.multiple(overlapped, MIN_BUCKET_MIB=8 / 2**20, BUCKET_FRACTION=1 / 4):  # 2 elements
        buckets = BucketedDataParallel(Numbers(*sizes))._buckets
    assert [sum(parameter.numel() for parameter in bucket) for bucket in buckets] == expected


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([1], [1]),
        ([1, 1, 1], [2, 1]),  # the least size
        ([1] * 16, [4, 3, 2, 2, 2, 2, 1]),  # a quarter of 16, of 12, of 9, ...
        ([4, 8, 3, 1], [4, 8, 4]),  # a gradient that is larger has a bucket of its own
        ([1] * 64, [16, 12, 9, 6, 5, 4, 3, 2, 2, 2, 2, 1]),
    ],
)
def test_buckets_without_a_size_shrink(sizes, expected, workers):
    workers.run(check_shrinking_buckets, 1, sizes, expected)


def check_bare_module(process):
    model = nn.Linear(3, 3)
    container = BucketedDataParallel(model)
    del container
    gc.collect()
    model(torch.ones(1, 3)).sum().backward()
    assert model.weight.grad is not None


def test_a_module_outlives_its_container(workers):
    workers.run(check_bare_module, 1)
