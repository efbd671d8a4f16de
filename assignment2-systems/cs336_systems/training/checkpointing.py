"""Gradient checkpointing: keep less of the forward pass, compute it again in the backward pass (Chen et al. 2016).

A checkpointed segment of blocks keeps only its input. When the backward pass reaches it, its forward pass runs again,
and what that saves lives until the gradients of the segment are computed. `theory.activations` says what each strategy
holds.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cs336_basics.model import BasicsTransformerLM
from cs336_systems.parallel.blocks import blocks_of
from cs336_systems.theory.activations import CheckpointStrategy


def apply_checkpointing(
    model: BasicsTransformerLM, strategy: CheckpointStrategy, group_size: int | None = None
) -> None:
    """Run the blocks of `model` under a strategy from now on, whenever gradients are recorded.

    Names of parameters, the state dict and all results stay the same.

    Args:
        model: changed in place; an earlier strategy is replaced.
        strategy: see `theory.activations`.
        group_size: blocks per group. Default: √N, rounded.
    """
    if group_size is not None and group_size < 1:
        raise ValueError(f"the group size is {group_size}, but must be at least 1 block")
    blocks = blocks_of(model)
    model.layers = nn.ModuleList(blocks) if strategy == "none" else CheckpointedLayers(blocks, strategy, group_size)


class CheckpointedLayers(nn.ModuleList):
    """Blocks that a model which loops over them runs segment by segment, each segment under a checkpoint.

    A loop sees the segments in place of the blocks; indices, names and length are still those of the blocks. Without
    autograd nothing is saved anyway, and a loop sees the blocks, with one cache for each.
    """

    def __init__(self, blocks: list[nn.Module], strategy: CheckpointStrategy, group_size: int | None) -> None:
        super().__init__(blocks)
        self.strategy = strategy
        self.group_size = group_size or max(1, round(math.sqrt(len(blocks))))

    def __iter__(self) -> Iterator[Callable[..., Tensor]]:  # type: ignore[override]
        blocks: list[nn.Module] = list(self.children())
        if not torch.is_grad_enabled():
            return iter(blocks)
        if self.strategy == "nested":
            return iter([partial(_nested, blocks)])
        size = 1 if self.strategy == "block" else self.group_size
        groups = [blocks[start : start + size] for start in range(0, len(blocks), size)]
        return iter([partial(_checkpointed, partial(_in_turn, group)) for group in groups])


def _in_turn(blocks: Sequence[nn.Module], x: Tensor, *rest: object) -> Tensor:
    for block in blocks:
        x = block(x, *rest)
    return x


def _nested(blocks: Sequence[nn.Module], x: Tensor, *rest: object) -> Tensor:
    if len(blocks) == 1:
        return blocks[0](x, *rest)
    half = (len(blocks) + 1) // 2
    for part in (blocks[:half], blocks[half:]):
        x = _checkpointed(partial(_nested, part), x, *rest)
    return x


def _checkpointed(function: Callable[..., Tensor], x: Tensor, *rest: object) -> Tensor:
    # The models have no dropout: there is no state of a random generator to keep.
    return checkpoint(function, x, *rest, use_reentrant=False, preserve_rng_state=False)
