"""Ring collectives and bucketed DDP against simulations of them."""

import math

import pytest

from cs336_systems.theory.collectives import (
    crossover_bytes,
    ddp_overhead,
    gather_bytes,
    optimal_bucket_bytes,
    ring_bytes,
    ring_seconds,
    whole_ring_bytes,
    whole_ring_seconds,
)


class Ring:
    """Ranks that hold lists of numbers of a byte each and send in rounds, all at once, to their right."""

    def __init__(self, ranks, size):
        self.ranks, self.size = ranks, size
        self.buffers = [[(rank + 2) * (i + 1) for i in range(size)] for rank in range(ranks)]
        self.expected = [sum(column) for column in zip(*self.buffers)]
        self.rounds = []  # bytes that each rank sent

    def send(self, messages):
        """What every rank receives from its left."""
        assert len({len(message) for message in messages}) == 1
        self.rounds.append(len(messages[0]))
        return [list(messages[rank - 1]) for rank in range(self.ranks)]

    def seconds(self, bytes_per_second, latency):
        return sum(latency + sent / bytes_per_second for sent in self.rounds)


def standard(ranks, size):
    ring, chunk = Ring(ranks, size), size // ranks

    def part(rank, number):
        start = number % ranks * chunk
        return ring.buffers[rank][start : start + chunk]

    for add, first in ((True, 0), (False, 1)):  # reduce-scatter, then all-gather
        for step in range(ranks - 1):
            received = ring.send([part(rank, rank + first - step) for rank in range(ranks)])
            for rank, message in enumerate(received):
                start = (rank - 1 + first - step) % ranks * chunk
                for i, value in enumerate(message, start):
                    ring.buffers[rank][i] = ring.buffers[rank][i] + value if add else value
    return ring


def whole(ranks, size):
    ring = Ring(ranks, size)
    passing = [list(buffer) for buffer in ring.buffers]
    for _ in range(ranks - 1):
        passing = ring.send(passing)
        ring.buffers = [[a + b for a, b in zip(*pair)] for pair in zip(ring.buffers, passing)]
    return ring


@pytest.mark.parametrize("ranks", [2, 3, 4, 7])
@pytest.mark.parametrize("size", [84, 420])
def test_all_reduces_as_simulated(ranks, size):
    for simulate, sent, seconds in (
        (standard, ring_bytes, ring_seconds),
        (whole, whole_ring_bytes, whole_ring_seconds),
    ):
        ring = simulate(ranks, size)
        assert all(buffer == ring.expected for buffer in ring.buffers)
        assert sum(ring.rounds) == pytest.approx(sent(size, ranks))
        assert ring.seconds(13.0, 0.7) == pytest.approx(seconds(size, ranks, 13.0, 0.7))
    # The two halves of a standard one are a reduce-scatter and an all-gather.
    assert sum(standard(ranks, size).rounds[: ranks - 1]) == pytest.approx(gather_bytes(size, ranks))


@pytest.mark.parametrize("ranks", [3, 4, 8, 64])
def test_below_the_crossover_whole_buffers_win(ranks):
    link = 450e9, 5e-6
    size = crossover_bytes(ranks, *link)
    assert whole_ring_seconds(size, ranks, *link) == pytest.approx(ring_seconds(size, ranks, *link))
    assert whole_ring_seconds(0.99 * size, ranks, *link) < ring_seconds(0.99 * size, ranks, *link)
    assert whole_ring_seconds(1.01 * size, ranks, *link) > ring_seconds(1.01 * size, ranks, *link)


def test_two_ranks_have_no_crossover():
    assert crossover_bytes(2, 450e9, 5e-6) == math.inf
    for size in (1.0, 1e12):
        assert whole_ring_bytes(size, 2) == ring_bytes(size, 2) == size
        assert whole_ring_seconds(size, 2, 450e9, 5e-6) < ring_seconds(size, 2, 450e9, 5e-6)


def test_all_ranks_broadcasting_their_shards_send_what_an_all_gather_does():
    ranks, shard = 5, 3
    received = [0] * ranks
    sent = 0
    for owner in range(ranks):
        for hop in range(1, ranks):
            received[(owner + hop) % ranks] += shard
            sent += shard
    assert set(received) == {gather_bytes(ranks * shard, ranks)}
    assert sent / ranks == gather_bytes(ranks * shard, ranks)


def simulated_overhead(total, bandwidth, call, buckets):
    each = total / buckets / bandwidth
    computed = sent = 0.0
    for _ in range(buckets):
        computed += each
        sent = max(computed, sent) + call + each
    return sent - computed


@pytest.mark.parametrize("buckets", [1, 2, 13, 200])
@pytest.mark.parametrize("call", [0.0, 0.003, 0.5])
def test_overhead_as_simulated(buckets, call):
    expected = simulated_overhead(7.0, 3.0, call, buckets)
    assert ddp_overhead(7.0, 3.0, call, buckets) == pytest.approx(expected)


def test_best_bucket_by_scan():
    total, bandwidth, call = 8e9, 450e9, 3e-5
    best = min(range(1, 2000), key=lambda n: simulated_overhead(total, bandwidth, call, n))
    assert total / optimal_bucket_bytes(total, bandwidth, call) == pytest.approx(best, abs=1)
    least = ddp_overhead(total, bandwidth, call, total / optimal_bucket_bytes(total, bandwidth, call))
    assert least == pytest.approx(2 * math.sqrt(total * call / bandwidth))
