"""The leaderboard of 2025: forward and backward pass of causal attention at one shape, in bfloat16.

Ours is called as the course calls it. PyTorch's kernels and the device's ceilings are timed in turn with it, so
that a warm or a busy minute meets all of them.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from cs336_basics.model import CausalAttention
from cs336_basics.strategy import resolve_device
from cs336_systems import triton_support
from cs336_systems.attention import AttentionName, causal_attention
from cs336_systems.bench_flash import CHECKED_SEQ, attention_flops, check_row, random_inputs
from cs336_systems.flash_attention import FlashAttentionTriton
from cs336_systems.measure import (
    OK,
    Measurement,
    ResultFile,
    Row,
    check_options,
    guarded,
    median_ms,
    progress,
    show,
    times_ms,
)

OURS: AttentionName = "flash"
#: Side of the square bfloat16 product that gives the ceiling of TFLOP/s.
MATMUL_SIZE = 8192
#: The copy on the device that gives the ceiling of its bandwidth, in MB of 10^6 bytes.
COPY_MB = 1024


@dataclass(frozen=True)
class Leaderboard2025(Measurement):
    """Time our FlashAttention at the leaderboard's shape, beside PyTorch's kernels and the device's ceilings."""

    heads: int = 16
    """Heads."""
    seq: int = 16_384
    """Sequence length."""
    dim: int = 64
    """Width of a head."""
    peers: tuple[AttentionName, ...] = ("sdpa-flash", "sdpa-cudnn", "flex")
    """What is timed beside ours."""
    rounds: int = 3
    """Rounds, each of which times everything once."""
    rep_ms: int = 1000
    """How long each median of a round is measured, in ms."""
    name: str = "leaderboard_2025"

    def execute(self) -> None:
        check_options(self, "heads", "seq", "dim", "rounds", "rep_ms")
        device = resolve_device(self.device)
        if device.type != "cuda" and not triton_support.INTERPRETED:
            raise ValueError(f"the leaderboard times Triton kernels, but the device is {device}; run it on a GPU")
        what = f"forward and backward of causal attention, [{self.heads} {self.seq} {self.dim}] bfloat16, .sum() loss"
        file = self.result_file(what, device)
        rows, ceilings = leaderboard_rows(self, device, file)
        show(what, rows, ("attention", "first_call_s", "ms", "TFLOP/s", "of_matmul", "vs_ours", "course_ms", "error"))
        show("ceilings of the device, measured in the same rounds", [ceilings])
        file.announce()


def leaderboard_rows(options: Leaderboard2025, device: torch.device, file: ResultFile) -> tuple[list[Row], Row]:
    """Time everything; what there is after each round is written to `file`.

    Returns:
        A row each: "first_call_s" with compilation and autotuning; "ms", "min_ms" and "max_ms", the median,
        fastest and slowest of the rounds' medians; "TFLOP/s"; "of_matmul", its share of the ceiling; "vs_ours",
        the time divided by ours. For ours also "error" (see `bench_flash.largest_error`) and, on a GPU,
        "course_ms", by the course's call: the mean of do_bench(rep=10000, warmup=1000). And the ceilings:
        "matmul_TFLOP/s", and "copy_GB/s" of bytes read and written.
    """
    q, k, v = torch.randn(
        3, options.heads, options.seq, options.dim, device=device, dtype=torch.bfloat16, requires_grad=True
    )
    names: tuple[AttentionName, ...] = (OURS, *options.peers)
    rows: list[Row] = []
    steps: dict[str, Callable[[], None]] = {}

    def first_call(name: AttentionName) -> Row:
        attend = _ours() if name == OURS else _without_batch(causal_attention(name))

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
            rows.append({"attention": name} | guarded(partial(first_call, name)))
        # After the first call, whose seconds would else lack the kernels that the check compiles.
        if rows[0]["status"] == OK:
            rows[0] |= guarded(lambda: _check(options, device))
        for number in range(1, options.rounds + 1):
            start(f"round {number}")
            for row in rows:
                if row["status"] == OK:
                    row |= guarded(partial(_time, steps[row["attention"]], taken[row["attention"]], options, device))
            ceilings.append(guarded(lambda: _ceilings(options, device)))
            summary = _summary(ceilings)
            for row in rows:
                if times := taken[row["attention"]]:
                    row |= _speed(times, taken[OURS], options, summary)
            file.write(rows, ceilings=summary)
        start("the course's call")
        if device.type == "cuda" and rows[0]["status"] == OK:
            from triton.testing import do_bench

            rows[0] |= guarded(lambda: {"course_ms": float(do_bench(steps[OURS], rep=10_000, warmup=1000))})
            file.write(rows, ceilings=summary)
    return rows, summary


def _ours() -> CausalAttention:
    flash = torch.compile(FlashAttentionTriton.apply)
    return lambda q, k, v: flash(q, k, v, True)


def _without_batch(attend: CausalAttention) -> CausalAttention:
    """`attend`, which wants [batch heads seq d], for [heads seq d]."""
    return lambda q, k, v: attend(q[None], k[None], v[None])[0]


def _check(options: Leaderboard2025, device: torch.device) -> Row:
    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # Not the compiled one: a second shape would make it compile once more, for any shape.
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
    """The medians of the rounds' ceilings; a round that ran out of memory has none."""
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
