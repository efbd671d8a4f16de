"""The leaderboard of 2026: one training step of a model of 8 billion parameters, on two GPUs.

Two contestants run the same step in the same run, from the same weights, on the same batch:

    ours     FSDP of `cs336_systems.parallel`, FlashAttention, the head fused with its loss, AdamW as one kernel
    torch    fully_shard, its FlashAttention (SDPA), cross_entropy compiled with the head, AdamW(fused=True)

Both keep master weights, gradients and moments in float32, compute and send weights and gradients in bfloat16,
checkpoint every block, and put each block through torch.compile.

For comparison: the course's naive baseline takes 10 s on two B200, the best public entry 3.84 s.
"""

import gc
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from jaxtyping import Int
from torch import Tensor

from cs336_basics.accounting import parameter_counts
from cs336_basics.model import ModelConfig
from cs336_systems.instruments.leaderboard_2025 import MATMUL_SIZE
from cs336_systems.instruments.measure import (
    OK,
    OUT_OF_MEMORY,
    ResultFile,
    Row,
    median_ms,
    now_ms,
    print_table,
    progress,
    result_file,
)
from cs336_systems.instruments.options.common import check_options
from cs336_systems.instruments.options.many_gpus import Contestant, Leaderboard2026
from cs336_systems.kernels import triton_support
from cs336_systems.parallel.blocks import compile_blocks
from cs336_systems.parallel.process_group import Rank, check_gpus, device_of_rank, run_on_ranks, under_torchrun
from cs336_systems.theory.large_model import step_bytes, step_flops
from cs336_systems.theory.units import GB
from cs336_systems.training.containers import HeadWithLoss
from cs336_systems.training.step import StepConfig, TrainingStep

#: Seconds per step on two B200, for comparison.
PUBLIC_S = {"naive baseline": 10.0, "best": 3.84}
#: The learning rate is small, so that the losses of both contestants can be compared over all steps. So is eps, which
#: Assignment 1's AdamW adds before its correction of the bias and PyTorch's after it, so that it makes no difference.
OPTIMIZER_OPTIONS = {"lr": 1e-5, "eps": 1e-12}


def run(options: Leaderboard2026) -> None:
    """Measure, print tables and write a file."""
    device = _checked_device(options)
    config = model_shape(options)
    parameters = sum(parameter_counts(config).values())
    what = f"training step of a model of {parameters / 1e9:.3g}B parameters"
    common = {
        "layers": options.layers, "context": options.context, "processes": options.processes,
        "batch": options.processes * options.batch_size, "mode": options.mode,
        "compute": str(compute_dtype(device)).removeprefix("torch."),
    }  # fmt: skip
    flops = step_flops(config, options.processes * options.batch_size)
    file = result_file(options, what, device, **common, step_flops=flops, public_s=PUBLIC_S)
    rows = leaderboard_rows(options, device, file)
    speed = ("contestant", "seconds", "tokens/s", "of_matmul", "first_loss", "last_loss", "loss_difference")
    memory = ("contestant", "initial_GB", "predicted_initial_GB", "peak_GB", "predicted_peak_GB")
    print_table(what, rows, speed, common=common, digits=4)
    if device.type == "cuda":
        print_table("memory per GPU", rows, memory)
    print("for comparison, on two B200: " + ", ".join(f"{name} {taken:g} s" for name, taken in PUBLIC_S.items()))
    file.announce()


def _checked_device(options: Leaderboard2026) -> torch.device:
    """Check the options, and return the device."""
    numbers = ("vocab", "context", "d_model", "d_ff", "layers", "heads", "processes", "batch_size", "steps")
    check_options(options, *numbers)
    check_options(options, "warmup", least=0)
    if not options.contestants:
        raise ValueError("there is nothing to measure: --contestants was given none; choose ours, torch or both")
    if under_torchrun():
        raise ValueError("leaderboard-2026 starts its ranks itself: run it without torchrun")
    device = device_of_rank(options.device, 0)
    check_gpus(options.processes, device.type)
    if device.type == "cpu" and "ours" in options.contestants and not triton_support.INTERPRETED:
        raise ValueError(
            "our contestant is made of Triton kernels and needs a GPU; set TRITON_INTERPRET=1 to try it on a CPU, or "
            "choose --contestants torch"
        )
    return device


def model_shape(options: Leaderboard2026) -> ModelConfig:
    """Return the shape of the model; raise a ValueError if there is no such shape."""
    return ModelConfig(options.vocab, options.context, options.d_model, options.layers, options.heads, options.d_ff)


def leaderboard_rows(options: Leaderboard2026, device: torch.device, file: ResultFile) -> list[Row]:
    """Measure a row for each contestant, which runs on ranks of its own.

    Returns:
        Rows with "seconds", the median time of a step of the slowest rank; "times_s", the times of all steps;
        "tokens/s"; "matmul_TFLOP/s", the speed of a matmul of square matrices on each GPU at the same time;
        "of_matmul", the share of it that the step reaches (model FLOPs utilization); "first_step_s", with compilation;
        "losses" of all steps, warm-up included, each the mean over ranks; "loss_difference", the largest difference
        from the losses of the first contestant; on GPUs "initial_GB", tensors held per GPU before the first step, and
        "peak_GB". Both are also predicted, and for compiled code "predicted_GB" has the moments of `step_bytes`.
    """
    rows: list[Row] = []
    with progress(len(options.contestants)) as start:
        for contestant in options.contestants:
            start(contestant)
            row: Row = {"contestant": contestant} | _predictions(options, contestant, device)
            parts = run_or_out_of_memory(
                measure_contestant, options.processes, device, options, contestant, timeout_s=options.timeout_s
            )
            row |= {"status": OUT_OF_MEMORY} if parts is None else {"status": OK} | _summary(parts, options)
            rows.append(row)
            _compare_losses(rows)
            file.write(rows)
    return rows


def _predictions(options: Leaderboard2026, contestant: Contestant, device: torch.device) -> Row:
    number = compute_dtype(device).itemsize
    moments = step_bytes(model_shape(options), contestant, options.batch_size, options.processes, number)
    predicted = {moment: size / GB for moment, size in moments.items()}
    row: Row = {"predicted_initial_GB": predicted["start"]}
    if options.mode == "eager":  # which keeps more than compiled code does
        return row
    return row | {"predicted_peak_GB": max(predicted.values()), "predicted_GB": predicted}


def _summary(parts: list[Row], options: Leaderboard2026) -> Row:
    """Combine the rows of all ranks into one."""
    times = [max(taken) for taken in zip(*(part["times_s"] for part in parts))]
    losses = [statistics.fmean(all_of_step) for all_of_step in zip(*(part["losses"] for part in parts))]
    timed = times[options.warmup :]
    seconds = statistics.median(timed)
    flops = step_flops(model_shape(options), options.processes * options.batch_size)
    ceiling = statistics.fmean(part["matmul_TFLOP/s"] for part in parts)
    row: Row = {
        "seconds": seconds,
        "times_s": timed,
        "first_step_s": times[0],
        "tokens/s": options.processes * options.batch_size * options.context / seconds,
        "matmul_TFLOP/s": ceiling,
        "of_matmul": flops / options.processes / seconds / (ceiling * 1e12),
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "losses": losses,
    }
    return row | {name: max(part[name] for part in parts) for name in ("initial_GB", "peak_GB") if name in parts[0]}


def _compare_losses(rows: list[Row]) -> None:
    measured = [row for row in rows if row["status"] == OK]
    if len(measured) > 1 and measured[-1] is rows[-1]:
        pairs = zip(measured[0]["losses"], measured[-1]["losses"])
        rows[-1]["loss_difference"] = max(abs(first - last) for first, last in pairs)


# The step


def compute_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of forward and backward pass. Triton's interpreter multiplies bfloat16 wrongly."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def contestant_step(options: Leaderboard2026, rank: Rank, contestant: Contestant) -> TrainingStep:
    """Build the training step of a contestant: the same weights on every rank, in float32, and this rank's batch."""
    on_gpu = rank.device.type == "cuda"
    config = StepConfig(
        model_shape(options), rank.device, options.batch_size, checkpointing="block", mode=options.mode,
        precision="bfloat16" if on_gpu else "float32", **_parts(contestant, on_gpu),
    )  # fmt: skip
    step = TrainingStep(config, rank)
    if options.mode == "compiled-blocks":
        # Eager, the norm's float32 copy takes 1 GB.
        compile_blocks(step.model.ln_final)
        if contestant == "torch":  # our loss consists of kernels already
            compile_blocks(*(module for module in step.module.modules() if isinstance(module, HeadWithLoss)))
    step.inputs, step.targets = batch_of(options, rank)
    return step


def _parts(contestant: Contestant, on_gpu: bool) -> dict[str, Any]:
    if contestant == "ours":
        attention = "flash" if on_gpu else "flash-pytorch"
        parts = {"attention": attention, "loss": "fused", "optimizer": "fused", "container": "fsdp"}
        return parts | {"optimizer_options": OPTIMIZER_OPTIONS}
    parts = {"attention": "sdpa-flash", "loss": "torch", "optimizer": "torch", "container": "fully-shard"}
    return parts | {"optimizer_options": OPTIMIZER_OPTIONS | {"fused": True}}


def batch_of(options: Leaderboard2026, rank: Rank) -> tuple[Int[Tensor, "batch context"], Int[Tensor, "batch context"]]:
    """Return this rank's sequences of a random batch: ids, and the ids that follow them."""
    generator = torch.Generator().manual_seed(1)
    shape = (rank.world_size, options.batch_size, options.context + 1)
    ids = torch.randint(options.vocab, shape, generator=generator)[rank.rank].to(rank.device)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def measure_contestant(rank: Rank, options: Leaderboard2026, contestant: Contestant) -> Row:
    """Run warm-up and timed steps on this rank.

    Returns:
        "times_s" and "losses" of all steps, "matmul_TFLOP/s", and on a GPU "initial_GB" and "peak_GB", the peak of the
        timed steps.
    """
    device, on_gpu = rank.device, rank.device.type == "cuda"
    step = contestant_step(options, rank, contestant)
    row: Row = {}
    if on_gpu:
        gc.collect()
        torch.cuda.empty_cache()
        row["initial_GB"] = torch.cuda.memory_allocated(device) / GB
    times, losses = [], []
    for number in range(options.warmup + options.steps):
        if on_gpu and number == options.warmup:
            torch.cuda.reset_peak_memory_stats(device)
        dist.barrier()
        started = now_ms(device)
        losses.append(step.full())
        times.append((now_ms(device) - started) / 1e3)
    if on_gpu:
        row["peak_GB"] = torch.cuda.max_memory_allocated(device) / GB
    losses_of_steps = torch.stack(losses).tolist()
    return row | {"times_s": times, "losses": losses_of_steps, "matmul_TFLOP/s": _matmul_teraflops(device)}


def _matmul_teraflops(device: torch.device) -> float:
    """Measure the ceiling while the GPU is as warm as the steps have left it."""
    size = MATMUL_SIZE if device.type == "cuda" else 256
    a, b = (torch.randn(size, size, device=device, dtype=compute_dtype(device)) for _ in range(2))
    dist.barrier()
    return 2 * size**3 / median_ms(lambda: a @ b, device, rep_ms=500) / 1e9


# Running out of memory


def run_or_out_of_memory(
    function: Callable[..., Row], world_size: int, device: torch.device, *args: Any, timeout_s: float
) -> list[Row] | None:
    """Call `function(rank, *args)` on new ranks; return None if any of them ran out of memory.

    A rank that has run out of memory ends at once, and the others, which may wait for it in a collective, are killed.
    It leaves a file behind, because the errors of the others depend on which of them notices first.
    """
    with tempfile.TemporaryDirectory() as folder:
        note = Path(folder) / "out_of_memory"
        try:
            return run_on_ranks(
                _ends_without_memory, world_size, function, note, args, device=device.type, timeout_s=timeout_s
            )
        except (mp.ProcessRaisedException, mp.ProcessExitedException):
            if note.exists():
                return None
            raise


def _ends_without_memory(rank: Rank, function: Callable[..., Row], note: Path, args: tuple[Any, ...]) -> Row:
    try:
        return function(rank, *args)
    except Exception as error:
        # Compilers and NCCL wrap the error.
        if not isinstance(error, torch.OutOfMemoryError) and "out of memory" not in str(error):
            raise
        note.touch()
        os._exit(1)  # leaving the group in an orderly way would wait for the others
