"""The leaderboard of 2025: forward and backward pass of causal attention at one shape, in bfloat16.

Our FlashAttention is called as the course calls it. PyTorch's kernels and the device's ceilings are timed in turn with
it, so that a warm or busy minute affects all of them.
"""

import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from cs336_basics.model import CausalAttention
from cs336_basics.strategy import resolve_device
from cs336_systems.instruments.flash import CHECKED_SEQ, check_row, random_inputs
from cs336_systems.instruments.measure import (
    OK,
    ResultFile,
    Row,
    median_ms,
    print_table,
    progress,
    result_file,
    times_ms,
    try_measure,
)
from cs336_systems.instruments.options.common import check_options
from cs336_systems.instruments.options.one_gpu import Leaderboard2025
from cs336_systems.kernels import triton_support
from cs336_systems.kernels.flash_attention import FlashAttentionTriton
from cs336_systems.theory.activations import attention_flops
from cs336_systems.training.choices import ATTENTIONS, AttentionName, resolve

OURS: AttentionName = "flash"
#: Side of the square bfloat16 matmul that gives the ceiling of TFLOP/s.
MATMUL_SIZE = 8192
#: Size of the copy on the device that gives the ceiling of its bandwidth, in MB (10^6 bytes).
COPY_MB = 1024


def run(options: Leaderboard2025) -> None:
    """Measure, print tables and write a file."""
    check_options(options, "heads", "seq", "dim", "rounds", "rep_ms")
    device = resolve_device(options.device)
    if device.type != "cuda" and not triton_support.INTERPRETED:
        raise ValueError(f"the leaderboard times Triton kernels, but the device is {device}; run it on a GPU")
    shape = f"[{options.heads} {options.seq} {options.dim}]"
    what = f"forward and backward of causal attention, {shape} bfloat16, .sum() loss"
    file = result_file(options, what, device)
    rows, ceilings = leaderboard_rows(options, device, file)
    columns = ("attention", "first_call_s", "ms", "TFLOP/s", "of_matmul", "vs_ours", "course_ms", "error")
    print_table(what, rows, columns)
    print_table("ceilings of the device, measured in the same rounds", [ceilings])
    file.announce()


def leaderboard_rows(options: Leaderboard2025, device: torch.device, file: ResultFile) -> tuple[list[Row], Row]:
    """Time all attentions; the rows so far are written to `file` after each round.

    Returns:
        A row for each attention: "first_call_s" with compilation and autotuning; "ms", "min_ms" and "max_ms", the
        median, fastest and slowest of the rounds' medians; "TFLOP/s"; "of_matmul", its share of the ceiling; "vs_ours",
        the time divided by ours. Our row also has "error" (see `flash.largest_error`) and, on a GPU, "course_ms", by
        the course's call: the mean of do_bench(rep=10000, warmup=1000). And the ceilings: "matmul_TFLOP/s", and
        "copy_GB/s" of bytes read and written.
    """
    q, k, v = torch.randn(
        3, options.heads, options.seq, options.dim, device=device, dtype=torch.bfloat16, requires_grad=True
    )
    names: tuple[AttentionName, ...] = (OURS, *options.peers)
    rows: list[Row] = []
    steps: dict[str, Callable[[], None]] = {}

    def first_call(name: AttentionName) -> Row:
        attend = _ours() if name == OURS else _without_batch(resolve(ATTENTIONS, name))

        def forward_backward() -> None:
            attend(q, k, v).sum().backward()

        (taken,) = times_ms(forward_backward, device, warmup=0, steps=1)
        steps[name] = forward_backward
        return {"first_call_s": taken / 1e3}

    taken: dict[str, list[float]] = {name: [] for name in names}
    ceilings: list[Row] = []
    summary: Row = {}
    with progress(len(names) + options.rounds + 1) as start:
        for name in names:
            start(f"first call of {name}")
            rows.append({"attention": name} | try_measure(partial(first_call, name)))
        # After the first call, whose seconds would otherwise lack the kernels that the check compiles.
        if rows[0]["status"] == OK:
            rows[0] |= try_measure(lambda: _check(options, device))
        for number in range(1, options.rounds + 1):
            start(f"round {number}")
            for row in rows:
                if row["status"] == OK:
                    row |= try_measure(
                        partial(_time, steps[row["attention"]], taken[row["attention"]], options, device)
                    )
            ceilings.append(try_measure(lambda: _ceilings(options, device)))
            summary = _summary(ceilings)
            for row in rows:
                if times := taken[row["attention"]]:
                    row |= _speed(times, taken[OURS], options, summary)
            file.write(rows, ceilings=summary)
        start("the course's call")
        if device.type == "cuda" and rows[0]["status"] == OK:
            from triton.testing import do_bench

            rows[0] |= try_measure(lambda: {"course_ms": float(do_bench(steps[OURS], rep=10_000, warmup=1000))})
            file.write(rows, ceilings=summary)
    return rows, summary


def _ours() -> CausalAttention:
    flash = torch.compile(FlashAttentionTriton.apply)
    return lambda q, k, v: flash(q, k, v, True)


def _without_batch(attend: CausalAttention) -> CausalAttention:
    """Adapt `attend`, which takes [batch heads seq d], to [heads seq d]."""
    return lambda q, k, v: attend(q[None], k[None], v[None])[0]


def _check(options: Leaderboard2025, device: torch.device) -> Row:
    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # Not the compiled function: a second shape would make it compile again, for dynamic shapes.
        return FlashAttentionTriton.apply(q, k, v, True)

    shape = options.heads, min(options.seq, CHECKED_SEQ), options.dim
    return check_row(ours, *random_inputs(*shape, dtype=torch.bfloat16, device=device))


def _time(step: Callable[[], None], times: list[float], options: Leaderboard2025, device: torch.device) -> Row:
    times.append(median_ms(step, device, warmup_ms=100, rep_ms=options.rep_ms))
    return {}


def _ceilings(options: Leaderboard2025, device: torch.device) -> Row:
    size = MATMUL_SIZE
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    matmul_ms = median_ms(lambda: a @ b, device, rep_ms=options.rep_ms)
    source = torch.zeros(COPY_MB * 10**6, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    copy_ms = median_ms(lambda: target.copy_(source), device, rep_ms=options.rep_ms)
    return {"matmul_TFLOP/s": 2 * size**3 / matmul_ms / 1e9, "copy_GB/s": 2 * COPY_MB / copy_ms}


def _summary(rounds: list[Row]) -> Row:
    """Return the medians of the rounds' ceilings; a round that ran out of memory has none."""
    names = ("matmul_TFLOP/s", "copy_GB/s")
    measured = [one for one in rounds if names[0] in one]
    return {name: statistics.median(one[name] for one in measured) for name in names} if measured else rounds[-1]


def _speed(times: list[float], ours: list[float], options: Leaderboard2025, ceilings: Row) -> Row:
    ms = statistics.median(times)
    speed = attention_flops(options.heads, options.seq, options.dim, "both") / ms / 1e9
    row: Row = {"ms": ms, "min_ms": min(times), "max_ms": max(times), "TFLOP/s": speed}
    if "matmul_TFLOP/s" in ceilings:
        row["of_matmul"] = speed / ceilings["matmul_TFLOP/s"]
    return row | ({"vs_ours": ms / statistics.median(ours)} if ours else {})
