"""Means, shares, and the check that all processes agree."""

from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from torch import nn

from cs336_systems.parallel import collectives
from cs336_systems.parallel.collectives import (
    AllGather,
    AllReduceMean,
    ReduceScatterMean,
    all_reduce_sum,
    broadcast,
    check_same_on_all_ranks,
    describe,
    flatten,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
worlds = pytest.mark.parametrize("world_size", [1, 2, 3])
#: Whether messages are copies of the tensors, as where gloo connects GPUs.
through = pytest.mark.parametrize("copies", [False, True], ids=["in place", "through copies"])


def messages(copies):
    """While this is entered, messages are sent from and received in copies of the tensors, or not."""
    if not copies:
        return nullcontext()
    return mock.patch.object(collectives, "_buffers", lambda tensors, group: [tensor.clone() for tensor in tensors])


def numbers(process, dtype=torch.float64):
    """[world_size 4 6] Whole numbers, the same in all processes; each takes its row. Sums of them do not round."""
    return torch.randint(-8, 8, (process.world_size, 4, 6)).to(dtype)


def check_all_reduce(process, dtype, copies):
    with messages(copies):
        check_means_in_place(process, dtype)
        total = torch.full((2, 3), process.rank, dtype=dtype).T
        all_reduce_sum(total)
    assert torch.equal(total, torch.full((3, 2), sum(range(process.world_size)), dtype=dtype))


def check_means_in_place(process, dtype):
    all_numbers = numbers(process, dtype)
    for take in (lambda x: x.clone(), lambda x: x.T.clone().T, lambda x: x.repeat(2, 2)[::2, ::2], lambda x: x[:0]):
        mean = (all_numbers.double().sum(0) / process.world_size).to(dtype)
        ours = take(all_numbers[process.rank])
        AllReduceMean([ours]).wait()
        assert torch.equal(ours, take(mean))
        several = [
            take(all_numbers[process.rank]),
            all_numbers[process.rank].clone()[1],
            take(all_numbers[process.rank]),
        ]
        AllReduceMean(several).wait()
        for ours, expected in zip(several, (take(mean), mean[1], take(mean)), strict=True):
            assert torch.equal(ours, expected)


@worlds
@through
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_reduce_leaves_the_mean_in_place(workers, world_size, dtype, copies):
    workers.run(check_all_reduce, world_size, dtype, copies)


def check_reduce_scatter(process, dtype, copies):
    all_numbers = numbers(process, dtype).flatten(1)
    with messages(copies):
        share = ReduceScatterMean(all_numbers[process.rank].clone(), None).wait(torch.float64)
    mean = all_numbers.double().sum(0) / process.world_size  # divided after the cast, so that it does not round
    torch.testing.assert_close(share, mean.chunk(process.world_size)[process.rank])


@worlds
@through
@pytest.mark.parametrize("dtype", DTYPES)
def test_reduce_scatter_gives_a_share_of_the_mean(workers, world_size, dtype, copies):
    workers.run(check_reduce_scatter, world_size, dtype, copies)


def check_all_gather(process, dtype, copies):
    all_numbers = numbers(process, dtype).flatten(1)
    output = torch.empty_like(all_numbers).flatten()
    with messages(copies):
        AllGather(output, all_numbers[process.rank].clone()).wait()
    assert torch.equal(output, all_numbers.flatten())


@worlds
@through
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_gather_lays_shares_end_to_end(workers, world_size, dtype, copies):
    workers.run(check_all_gather, world_size, dtype, copies)


def check_broadcast(process, copies):
    with messages(copies):
        check_values_of_sources(process)


def check_values_of_sources(process):
    def tensors(rank):
        return [
            torch.full((2, 3), float(rank)),
            nn.Parameter(torch.full((3, 2), float(rank)).T),  # not contiguous
            torch.tensor(rank),
            torch.tensor([rank > 1, rank > 0]),
            torch.empty(0),
        ]

    ours = tensors(process.rank)
    broadcast(ours)
    assert all(torch.equal(a, b) for a, b in zip(ours, tensors(0)))
    ours, sources = tensors(process.rank), [2, 1, 0, 1, 2]
    broadcast(ours, sources)
    assert all(torch.equal(a, tensors(source)[i]) for i, (a, source) in enumerate(zip(ours, sources)))


@through
def test_broadcast_from_one_and_from_several(workers, copies):
    workers.run(check_broadcast, 3, copies)


def check_disagreement(process, lines):
    with pytest.raises(ValueError, match="different options") as error:
        check_same_on_all_ranks(lines[process.rank], "options")
    return str(error.value)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([["a", "b"], ["a", "b"], ["a", "c"]], "rank 0 has b, rank 2 has c (differing from rank 0: 2)"),
        ([["a"], ["b"], ["c"]], "rank 0 has a, rank 1 has b (differing from rank 0: 1, 2)"),
        ([["a", "b"], ["a"], ["a", "b"]], "rank 0 has b, rank 1 has nothing (differing"),
        ([[], ["a"], []], "rank 0 has nothing, rank 1 has a (differing"),
    ],
)
def test_a_difference_is_named_in_every_process(workers, lines, message):
    errors = workers.run(check_disagreement, 3, lines)
    assert message in errors[0]
    assert len(set(errors)) == 1


def check_agreement(process):
    check_same_on_all_ranks(["a", "b"], "options")
    check_same_on_all_ranks([], "options")


def test_agreement_is_silent(workers):
    workers.run(check_agreement, 3)


def test_description_of_a_module():
    module = nn.BatchNorm1d(2)
    module.bias.requires_grad_(False)
    assert describe(module) == [
        "parameter weight (2,) torch.float32",
        "parameter bias (2,) torch.float32 frozen",
        "buffer running_mean (2,) torch.float32",
        "buffer running_var (2,) torch.float32",
        "buffer num_batches_tracked () torch.int64",
    ]


def test_flat_tensors_have_memory_of_their_own():
    a, b = torch.arange(6.0).view(2, 3).T, torch.tensor(7.0)
    assert flatten([a, b]).tolist() == [0, 3, 1, 4, 2, 5, 7]
    single = torch.ones(2)
    flatten([single]).zero_()
    assert single.tolist() == [1, 1]
