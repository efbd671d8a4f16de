"""Activations that a forward pass keeps for its backward pass, in bytes: attention alone, and checkpointed blocks.

Gradient checkpointing keeps the input of a segment and computes the rest again (Chen et al. 2016). With N blocks,
s bytes in a tensor of the residual stream and A bytes that a block saves, the blocks hold at most

    none     N A
    block    N s + A                    every block by itself
    group    ⌈N/k⌉ s + k A - s          k blocks at a time; Chen's √N
    nested   ⌈log₂ N⌉ s + A             halves of halves: checkpoints within checkpoints

Chen's groups are best where A = s. A block of a Transformer saves far more than its input (A is 30 s and more), so here
single blocks hold less. Nesting holds least, at the price of (log₂(N) + 1)/2 additional forward passes instead of one.
"""

import math
from dataclasses import dataclass
from typing import Literal

from cs336_systems.theory.units import FLOAT32

CheckpointStrategy = Literal["none", "block", "group", "nested"]


@dataclass(frozen=True)
class SavedBytes:
    """Bytes that a forward pass saves for its backward pass. Parameters do not count."""

    stream: int
    """s: a tensor of the residual stream."""
    block: int
    """A: one block, its input included."""
    head: int
    """Final norm, logits and loss."""


def checkpointed_bytes(
    strategy: CheckpointStrategy, blocks: int, saved: SavedBytes, group_size: int | None = None
) -> tuple[int, int]:
    """Activations held after the forward pass, and the most held at any time, by the formulas above.

    The peak comes either at the end of the forward pass, with the head's activations, or when the first segment is
    computed again and the head's activations are gone. Gradients of activations are not counted.
    """
    s, block = saved.stream, saved.block
    size = group_size or max(1, round(math.sqrt(blocks)))
    depth = math.ceil(math.log2(blocks))
    kept, at_most = {
        "none": (blocks * block, blocks * block),
        "block": (blocks * s, blocks * s + block - s),
        "group": (math.ceil(blocks / size) * s, math.ceil(blocks / size) * s + size * block - s),
        "nested": (min(blocks, 2) * s if blocks > 1 else block, depth * s + block),
    }[strategy]
    return kept + saved.head, max(kept + saved.head, at_most)


def attention_bytes(batch_size: int, seq: int, dim: int, bytes_per_number: int, keeps_scores: bool) -> int:
    """Bytes that eager causal attention with one head holds just before its backward pass.

    Every implementation holds Q, K, V, the output and the output's gradient. Plain attention also keeps two
    [seq seq] matrices for each sequence (the exponentials of the scores and the probabilities), the row sums of the
    exponentials, and one mask of a byte per entry. A fused kernel keeps the log-sum-exp of each row in float32 instead.

    Args:
        batch_size: sequences, of one head each.
        seq, dim: length of a sequence and width of the head.
        bytes_per_number: of Q, K and V.
        keeps_scores: True for plain attention, False for FlashAttention and its relatives.
    """
    tensors = 5 * batch_size * seq * dim * bytes_per_number
    if keeps_scores:
        return tensors + batch_size * (2 * seq * seq + seq) * bytes_per_number + seq * seq
    return tensors + batch_size * seq * FLOAT32


def attention_flops(heads: int, seq: int, dim: int, which: Literal["forward", "backward", "both"] = "forward") -> float:
    """FLOPs of causal attention: two matmuls of 2 · seq² · dim per head, half masked; backward: 2.5 times as many."""
    forward = heads * 2 * (2 * seq * seq * dim) / 2
    return forward * {"forward": 1.0, "backward": 2.5, "both": 3.5}[which]


def attention_traffic_bytes(heads: int = 16, seq: int = 16_384, dim: int = 64, bytes_per_number: int = 2) -> float:
    """The fewest bytes that forward and backward pass of attention can move through memory.

    The forward pass reads Q, K, V and writes O; the backward pass reads Q, K, V, O, dO and writes dQ, dK, dV. The
    defaults are the 2025 leaderboard's.
    """
    return 12 * heads * seq * dim * bytes_per_number
