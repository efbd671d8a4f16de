"""Measure gradient checkpointing: what each strategy saves, its peak and its time, compared with the formulas.

The strategies are in `training.checkpointing`, the formulas in `theory.activations`.
"""

import statistics
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from cs336_basics.model import BasicsTransformerLM
from cs336_basics.strategy import resolve_device
from cs336_systems.instruments.measure import Row, extra_bytes, print_table, result_file, run_grid, times_ms
from cs336_systems.instruments.options.common import check_options
from cs336_systems.instruments.options.one_gpu import Checkpointing
from cs336_systems.instruments.step import step_cases, step_of_case
from cs336_systems.parallel.blocks import blocks_of
from cs336_systems.theory.activations import CheckpointStrategy, SavedBytes, checkpointed_bytes
from cs336_systems.theory.units import MB
from cs336_systems.training.checkpointing import apply_checkpointing
from cs336_systems.training.step import StepConfig, TrainingStep


def run(options: Checkpointing) -> None:
    """Measure, print a table and write a file."""
    check_options(options, "steps", "group_size")
    check_options(options, "warmup", least=0)
    device = resolve_device(options.device)
    cases = step_cases(options, device, strategy=options.strategies)
    what = "forward and backward pass with gradient checkpointing"
    file = result_file(options, what, device, batch_size=options.batch_size)

    def measure(case: Row) -> Row:
        config = step_of_case(options, case, device)
        return measure_checkpointing(config, case["strategy"], options.group_size, options.warmup, options.steps)

    rows = run_grid(cases, measure, file)
    print_table(what, rows, settings=list(cases[0]), common={"batch_size": options.batch_size})
    file.announce()


def saved_bytes(function: Callable[[], object], parameters: Iterable[Tensor]) -> int:
    """Count the bytes of the storages that autograd holds after `function`, before its result is dropped.

    What a checkpoint will compute again is not counted, and takes no memory.
    """
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    held: dict[int, int] = {}
    kept = []  # so that no address is reused while counting

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
    """Count what one block and the head save, each by itself."""
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


def measure_checkpointing(
    config: StepConfig, strategy: CheckpointStrategy, group_size: int | None, warmup: int, steps: int
) -> Row:
    """Measure and predict the saved and peak activations of a strategy, in MB, and measure its time.

    The gradients exist before the measured step, so that its peak minus the level before it is the memory of
    activations and temporary tensors.
    """
    step = TrainingStep(config)
    parts = saved_by_parts(step)
    apply_checkpointing(step.model, strategy, group_size)
    blocks = config.model.num_layers
    kept, peak = checkpointed_bytes(strategy, blocks, parts, group_size)

    forwards = _CountForwards(step.model)
    step.forward_backward()
    row: Row = {
        "forwards": forwards.count / blocks,
        "saved_MB": saved_bytes(step.forward, step.model.parameters()) / MB,
        "predicted_saved_MB": kept / MB,
    }
    forwards.remove()
    if config.device.type == "cuda":

        def accumulate() -> None:
            step.forward().backward()

        row["peak_MB"] = extra_bytes(accumulate, config.device) / MB
        row["predicted_peak_MB"] = peak / MB
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
