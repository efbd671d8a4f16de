"""The leaderboard of 2025: forward and backward pass of causal attention at one shape, in bfloat16.

Ours is called as the course calls it. PyTorch's kernels and the device's ceilings are timed in turn with it, so
that a warm or a busy minute meets all of them.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from cs336_basics.model import CausalAttention
from cs336_systems.bench_attention import check_options, guarded, in_columns, print_reasons, save_quietly
from cs336_systems.bench_flash import CHECKED_SEQ, Implementation, attention_flops, check_row, find, random_inputs
from cs336_systems.flash_attention import FlashAttentionTriton
from cs336_systems.measure import Row, default_device, median_ms, show, synchronize, write_result

Peer = Literal["plain", "sdpa-flash", "sdpa-cudnn", "flex"]

OURS: Implementation = "flash"


@dataclass(frozen=True)
class Leaderboard2025:
    """Time our FlashAttention at the leaderboard's shape, beside PyTorch's kernels and the device's ceilings."""

    heads: int = 16
    """Heads."""
    seq: int = 16_384
    """Sequence length."""
    dim: int = 64
    """Width of a head."""
    peers: tuple[Peer, ...] = ("sdpa-flash", "sdpa-cudnn", "flex")
    """What is timed beside ours: plain (Assignment 1's attention), PyTorch's FlashAttention-2 and cuDNN kernels,
    and FlexAttention."""
    rounds: int = 3
    """Rounds, each of which times everything once."""
    rep_ms: int = 1000
    """How long each median of a round is measured, in ms."""
    course: bool = True
    """Also time ours by the course's own call, the mean of do_bench(rep=10000, warmup=1000). Needs a GPU."""
    check: bool = True
    """First compare ours with float32 attention, on a sequence of at most 4096."""
    matmul_size: int = 8192
    """Side of the square bfloat16 product that gives the ceiling of TFLOP/s."""
    copy_mb: int = 1024
    """Size of the copy on the device that gives the ceiling of its bandwidth, in MB of 10^6 bytes."""
    name: str = "leaderboard_2025"
    """The result is written to <out>/<name>.json."""
    out: Path = Path("results")
    """Folder for the result."""

    def execute(self) -> None:
        check_options(self, "heads", "seq", "dim", "rounds", "rep_ms", "matmul_size", "copy_mb")
        device = default_device()
        what = f"forward and backward of causal attention, [{self.heads} {self.seq} {self.dim}] bfloat16, .sum() loss"

        def save(rows: list[Row], ceilings: Row) -> None:
            save_quietly(self.out, self.name, what, rows, device, ceilings=ceilings)

        rows, ceilings = leaderboard_rows(self, device, save)
        # What a terminal has room for, and the status last; all columns are in the file.
        shown = ("attention", "first_call_s", "ms", "TFLOP/s", "of_matmul", "vs_ours", "course_ms", "status")
        show(what, in_columns(rows, dict(zip(shown, shown))))
        print_reasons(rows, "attention")
        show("ceilings of the device, measured in the same rounds", [ceilings])
        write_result(self.out, self.name, what, rows, device, ceilings=ceilings)


def leaderboard_rows(
    options: Leaderboard2025, device: torch.device, save: Callable[[list[Row], Row], None]
) -> tuple[list[Row], Row]:
    """Time everything; `save` is called with what there is after each round.

    Returns:
        A row each: "first_call_s" with compilation and autotuning; "ms", "min_ms" and "max_ms", the median,
        fastest and slowest of the rounds' medians; "TFLOP/s"; "of_matmul", its share of the ceiling; "vs_ours",
        the time divided by ours; for ours "course_ms", by the course's call. And the ceilings: "matmul_TFLOP/s",
        and "copy_GB/s" of bytes read and written.
    """
    q, k, v = torch.randn(
        3, options.heads, options.seq, options.dim, device=device, dtype=torch.bfloat16, requires_grad=True
    )
    names: tuple[Implementation, ...] = (OURS, *options.peers)
    rows: list[Row] = [{"attention": name, "status": "ok"} for name in names]
    steps: dict[str, Callable[[], None]] = {}

    def first_call(name: Implementation) -> Row:
        attend = _ours() if name == OURS else _without_batch(find(name, options.seq, device))

        def forward_backward() -> None:
            attend(q, k, v).sum().backward()

        started = time.perf_counter()
        forward_backward()
        synchronize(device)
        steps[name] = forward_backward
        return {"first_call_s": time.perf_counter() - started}

    for row, name in zip(rows, names):
        row |= guarded(partial(first_call, name))
    # After the first call, whose seconds would else lack the kernels that the check compiles.
    if options.check and rows[0]["status"] == "ok":
        rows[0] |= guarded(lambda: _check(options, device))

    taken: dict[str, list[float]] = {name: [] for name in names}
    ceilings: list[Row] = []
    summary: Row = {}
    for _ in range(options.rounds):
        for row in rows:
            if row["status"] == "ok":
                row |= guarded(partial(_time, steps[row["attention"]], taken[row["attention"]], options, device))
        ceilings.append(guarded(lambda: _ceilings(options, device)))
        summary = _summary(ceilings)
        for row in rows:
            if times := taken[row["attention"]]:
                row |= _speed(times, taken[OURS], options, summary)
        save(rows, summary)
    if options.course and device.type == "cuda" and rows[0]["status"] == "ok":
        from triton.testing import do_bench

        rows[0] |= guarded(lambda: {"course_ms": float(do_bench(steps[OURS], rep=10_000, warmup=1000))})
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
    size = options.matmul_size
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    matmul_ms = median_ms(lambda: a @ b, device, rep_ms=options.rep_ms)
    source = torch.zeros(options.copy_mb * 10**6, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    copy_ms = median_ms(lambda: target.copy_(source), device, rep_ms=options.rep_ms)
    return {"matmul_TFLOP/s": 2 * size**3 / matmul_ms / 1e9, "copy_GB/s": 2 * options.copy_mb / copy_ms}


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
