"""Bytes and seconds of ring collectives, and what bucketed DDP adds to a step.

Sizes are in bytes, times in seconds, rates in bytes per second. There are N ranks and S bytes in a buffer.
All-gather, reduce-scatter and a broadcast of all shards send (N - 1)/N S bytes through each rank's link. An all-reduce
is a reduce-scatter followed by an all-gather, and costs twice that.
"""

import math


def gather_bytes(buffer_bytes: float, ranks: int) -> float:
    """Bytes that each rank sends for an all-gather or a reduce-scatter of S bytes: (N - 1)/N S.

    Every rank needs what the other N - 1 hold, S/N each. If every rank broadcasts its own S/N, this is what a rank
    receives, and what it sends on average.
    """
    return (ranks - 1) / ranks * buffer_bytes


def ring_bytes(buffer_bytes: float, ranks: int) -> float:
    """Bytes that each rank sends in a ring all-reduce: reduce-scatter and all-gather, 2 (N - 1)/N S."""
    return 2 * gather_bytes(buffer_bytes, ranks)


def ring_seconds(buffer_bytes: float, ranks: int, bytes_per_second: float, latency_s: float) -> float:
    """Time of a ring all-reduce: 2 (N - 1) rounds, in each of which S/N bytes travel one hop."""
    return 2 * (ranks - 1) * (latency_s + buffer_bytes / ranks / bytes_per_second)


def whole_ring_bytes(buffer_bytes: float, ranks: int) -> float:
    """Bytes that each rank sends if whole buffers travel around the ring and each rank adds them up: (N - 1) S.

    Every rank adds in an order of its own, so that for N > 2 the replicas differ in their last bits. Each rank also
    needs a second buffer for what it passes on.
    """
    return (ranks - 1) * buffer_bytes


def whole_ring_seconds(buffer_bytes: float, ranks: int, bytes_per_second: float, latency_s: float) -> float:
    """Time of an all-reduce by whole buffers: N - 1 rounds, in each of which S bytes travel one hop."""
    return (ranks - 1) * (latency_s + buffer_bytes / bytes_per_second)


def crossover_bytes(ranks: int, bytes_per_second: float, latency_s: float) -> float:
    """The buffer size below which whole buffers are faster, because half as many hops outweigh N/2 times the bytes.

    l + S/W < 2 l + 2 S/(N W) holds for S < l W N/(N - 2). Two ranks send the same bytes either way: any buffer.
    """
    return math.inf if ranks <= 2 else latency_s * bytes_per_second * ranks / (ranks - 2)


def ddp_overhead(total_bytes: float, bytes_per_second: float, call_s: float, buckets: float) -> float:
    """Seconds from the end of the backward pass until all gradients are averaged: s/(n w) + n o, for n buckets.

    Computing a bucket's gradients takes t = s/(n w), assumed to be as long as communicating them. The first
    all-reduce starts at t. From then on one follows the other, n of them with o + t each, because each has to wait for
    its gradients. The last one ends at t + n (o + t). The backward pass ended at n t, which leaves t + n o.
    """
    return total_bytes / (buckets * bytes_per_second) + buckets * call_s


def optimal_bucket_bytes(total_bytes: float, bytes_per_second: float, call_s: float) -> float:
    """The bucket size that minimizes `ddp_overhead`: √(o s w), where both terms are equal, at n = √(s/(o w)).

    The overhead is then 2 √(s o/w).
    """
    return math.sqrt(call_s * total_bytes * bytes_per_second)
