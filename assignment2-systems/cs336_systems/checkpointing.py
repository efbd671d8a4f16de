"""Gradient checkpointing: keep less of the forward pass, compute it again in the backward pass (Chen et al. 2016).

A checkpointed segment of blocks keeps its input alone. When the backward pass reaches it, its forward pass runs
again, and what it then saves is there until the gradients of the segment are done. With N blocks, s bytes in a
tensor of the residual stream and A bytes that a block saves, the blocks hold at most

    none     N A
    block    N s + A                    every block for itself
    group    ⌈N/k⌉ s + k A - s          k blocks at a time; Chen's √N
    nested   ⌈log₂ N⌉ s + A             halves of halves: checkpoints within checkpoints

Chen's groups are best where A = s. A Transformer's block saves far more than its input (A is 30 s and more), so
here single blocks hold less. Nesting holds least, for (log₂(N) + 1)/2 more forward passes in place of one.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cs336_basics.model import BasicsTransformerLM
from cs336_basics.strategy import resolve_device
from cs336_systems.measure import Row, check_options, extra_bytes, gpu_or_cpu, run_grid, show, times_ms
from cs336_systems.models import SizeName, blocks_of
from cs336_systems.training_step import StepConfig, StepGrid, TrainingStep

CheckpointStrategy = Literal["none", "block", "group", "nested"]


@dataclass(frozen=True)
class Checkpointing(StepGrid):
    """Compare gradient checkpointing strategies: what they keep, the peak of memory, and their time."""

    sizes: tuple[SizeName, ...] = gpu_or_cpu(("xl",), ("tiny",))
    contexts: tuple[int, ...] = gpu_or_cpu((512,), (128,))
    strategies: tuple[CheckpointStrategy, ...] = ("none", "group", "block", "nested")
    """Checkpoint nothing, groups of blocks, each block, or halves of halves."""
    group_size: int | None = None
    """Blocks per group. Default: the square root of the number of blocks."""
    warmup: int = 2
    """Steps before the clock starts."""
    steps: int = 5
    """Forward and backward passes that are timed."""
    name: str = "checkpointing"

    def execute(self) -> None:
        check_options(self, "steps", "group_size")
        check_options(self, "warmup", least=0)
        device = resolve_device(self.device)
        cases = self.cases(device, strategy=self.strategies)
        what = "forward and backward pass with gradient checkpointing"
        file = self.result_file(what, device, batch_size=self.batch_size)

        def measure(case: Row) -> Row:
            config = self.step_config(case, device)
            return measure_checkpointing(config, case["strategy"], self.group_size, self.warmup, self.steps)

        rows = run_grid(cases, measure, file)
        show(what, rows, settings=list(cases[0]), common={"batch_size": self.batch_size})
        file.announce()


def apply_checkpointing(
    model: BasicsTransformerLM, strategy: CheckpointStrategy, group_size: int | None = None
) -> None:
    """Let the blocks of `model` run under a strategy, from now on and whenever gradients are recorded.

    Names of parameters, the state dict and all results stay what they are.

    Args:
        model: changed in place; a strategy that it had before is replaced.
        strategy: see the head of this module.
        group_size: blocks per group. Default: √N, rounded.
    """
    if group_size is not None and group_size < 1:
        raise ValueError(f"the group size is {group_size}, but must be at least 1 block")
    blocks = blocks_of(model)
    model.layers = nn.ModuleList(blocks) if strategy == "none" else CheckpointedLayers(blocks, strategy, group_size)


class CheckpointedLayers(nn.ModuleList):
    """Blocks that a model which loops over them runs segment by segment, each under a checkpoint.

    A loop sees the segments in the blocks' stead; indices, names and length are still those of the blocks.
    Without autograd, nothing is saved anyway and a loop sees the blocks, one cache for each.
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


@dataclass(frozen=True)
class SavedBytes:
    """What a forward pass saves for its backward pass, in bytes. Parameters do not count."""

    stream: int
    """s: a tensor of the residual stream."""
    block: int
    """A: one block, its input included."""
    head: int
    """Final norm, logits and loss."""


def saved_bytes(function: Callable[[], object], parameters: Iterable[Tensor]) -> int:
    """Bytes of the storages that autograd holds after `function`, and before its result is dropped.

    What a checkpoint will compute again is not seen, and takes no memory.
    """
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    held: dict[int, int] = {}
    kept = []  # so that no address is used again while counting

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    del result
    return sum(held.values())


def saved_by_parts(step: TrainingStep) -> SavedBytes:
    """Count what one block and the head save, each on its own."""
    model = step.model
    x = model.token_embeddings(step.inputs).detach().requires_grad_()
    block = blocks_of(model)[0]

    def head() -> Tensor:
        with step.autocast():
            return step.loss_of_stream(x)

    def one_block() -> Tensor:
        with step.autocast():
            return block(x)

    return SavedBytes(
        stream=x.untyped_storage().nbytes(),
        block=saved_bytes(one_block, model.parameters()),
        head=saved_bytes(head, model.parameters()),
    )


def predicted_bytes(
    strategy: CheckpointStrategy, blocks: int, saved: SavedBytes, group_size: int | None = None
) -> tuple[int, int]:
    """Activations held after the forward pass, and the most held at any time, by the formulas above.

    The peak comes either at the end of the forward pass, with the head's activations, or when the first segment
    is computed again and the head's are gone. Gradients of activations are not counted.
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


def measure_checkpointing(
    config: StepConfig, strategy: CheckpointStrategy, group_size: int | None, warmup: int, steps: int
) -> Row:
    """Saved and peak activations of a strategy, measured and predicted, in MB of 10^6 bytes, and the time it takes.

    The gradients are there before the step that is measured, so that its peak above the level before it is what
    activations and temporary tensors take.
    """
    step = TrainingStep(config)
    parts = saved_by_parts(step)
    apply_checkpointing(step.model, strategy, group_size)
    blocks = config.model.num_layers
    kept, peak = predicted_bytes(strategy, blocks, parts, group_size)

    forwards = _CountForwards(step.model)
    step.forward_backward()
    row: Row = {
        "forwards": forwards.count / blocks,
        "saved_MB": saved_bytes(step.forward, step.model.parameters()) / 1e6,
        "predicted_saved_MB": kept / 1e6,
    }
    forwards.remove()
    if config.device.type == "cuda":

        def accumulate() -> None:
            step.forward().backward()

        row["peak_MB"] = extra_bytes(accumulate, config.device) / 1e6
        row["predicted_peak_MB"] = peak / 1e6
    row["step_ms"] = statistics.median(times_ms(step.forward_backward, config.device, warmup, steps))
    return row


class _CountForwards:
    """Counts how often blocks of a model run."""

    def __init__(self, model: BasicsTransformerLM) -> None:
        self.count = 0
        self._hooks = [block.register_forward_pre_hook(self._ran) for block in blocks_of(model)]

    def _ran(self, *_: object) -> None:
        self.count += 1

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
