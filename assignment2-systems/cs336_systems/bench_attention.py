"""Attention alone, eager and compiled: the time of each pass, and the memory that waits for the backward pass."""

import contextlib
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.progress import track

from cs336_systems.attention import AttentionName, causal_attention
from cs336_systems.measure import Row, default_device, or_out_of_memory, show, synchronize, write_result

DType = Literal["float32", "bfloat16", "float16"]

#: What stands in a row where an implementation refuses a shape or dtype; its "reason" says why.
UNSUPPORTED = "unsupported"


@dataclass(frozen=True)
class BenchAttention:
    """Time causal attention alone, and measure what it holds for its backward pass."""

    seqs: tuple[int, ...] = (256, 1024, 4096, 8192, 16384)
    """Sequence lengths."""
    dims: tuple[int, ...] = (16, 32, 64, 128)
    """Widths of a head."""
    batch_size: int = 8
    """Sequences at once, of one head each."""
    attention: tuple[AttentionName, ...] = ("plain",)
    """plain: Assignment 1's attention. flash: ours. flash-pytorch: its reference. sdpa-*: PyTorch's
    FlashAttention-2 and cuDNN kernels, which know half precision alone."""
    dtype: DType = "float32"
    """Precision of queries, keys and values."""
    steps: int = 100
    """Forward and backward passes that are timed."""
    warmup: int = 5
    """Passes before them."""
    eager: bool = True
    """Measure the functions as they are."""
    compile: bool = True
    """Measure them under torch.compile."""
    name: str = "bench_attention"
    """The result is written to <out>/<name>.json."""
    out: Path = Path("results")
    """Folder for the result."""

    def execute(self) -> None:
        check_options(self, "seqs", "dims", "batch_size", "steps")
        check_options(self, "warmup", least=0)
        modes = [*(["eager"] if self.eager else []), *(["compiled"] if self.compile else [])]
        if not modes:
            raise ValueError("--no-eager and --no-compile together leave nothing to measure; drop one of them")
        device = default_device()
        what = f"causal attention, batch {self.batch_size}, one head, {self.dtype}, mean of {self.steps} passes"
        rows: list[Row] = []
        cases = list(product(self.attention, modes, self.dims, self.seqs))
        console = Console(stderr=True)
        for attention, mode, dim, seq in track(
            cases, "attention", console=console, transient=True, disable=not console.is_terminal
        ):
            row = attention_row(
                attention, self.batch_size, seq, dim, self.dtype, device,
                compiled=mode == "compiled", steps=self.steps, warmup=self.warmup,
            )  # fmt: skip
            rows.append(row)
            save_quietly(self.out, self.name, what, rows, device)
        # The numbers of a shape side by side, and what did not work in words; all columns are in the file.
        shown = ("mode", "dim", "seq", "forward_ms", "backward_ms", "memory_MB", "predicted_MB", "status")
        for attention in self.attention:
            chosen = [row for row in rows if row["attention"] == attention]
            show(f"{attention}: {what}", in_columns(chosen, dict(zip(shown, shown))))
        print_reasons(rows, "attention")
        write_result(self.out, self.name, what, rows, device)


def attention_row(
    attention: AttentionName,
    batch_size: int,
    seq: int,
    dim: int,
    dtype: DType,
    device: torch.device,
    *,
    compiled: bool = False,
    steps: int = 100,
    warmup: int = 5,
) -> Row:
    """Time forward and backward passes of one shape, each by itself and synchronised.

    Returns:
        The shape, and the means and standard deviations in ms. On a GPU "memory_MB" is what tensors hold when
        the backward pass is about to start (10^6 bytes; without the workspaces of cuBLAS, which stay between
        calls). "predicted_MB" is the same from the shapes.
    """
    row: Row = {
        "attention": attention,
        "mode": "compiled" if compiled else "eager",
        "dtype": dtype,
        "batch": batch_size,
        "dim": dim,
        "seq": seq,
    }

    def measure() -> Row:
        attend = causal_attention(attention)
        if compiled:
            torch.compiler.reset()  # kernels of earlier shapes, which torch.compile would keep only so many of
            attend = torch.compile(attend, dynamic=False)
        # PyTorch's fused kernels insist on a dimension for the heads.
        q, k, v, d_out = torch.randn(4, batch_size, 1, seq, dim, device=device, dtype=getattr(torch, dtype))
        q, k, v, d_out = (tensor.clone() for tensor in (q, k, v, d_out))
        inputs = [tensor.requires_grad_() for tensor in (q, k, v)]
        forward: list[float] = []
        backward: list[float] = []
        held = 0
        for step in range(warmup + steps):
            before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
            started = _now(device)
            output = attend(*inputs)
            computed = _now(device)
            held = (torch.cuda.memory_allocated() if device.type == "cuda" else 0) - before
            resumed = _now(device)
            output.backward(d_out)
            finished = _now(device)
            if step >= warmup:
                forward.append((computed - started) * 1e3)
                backward.append((finished - resumed) * 1e3)
            del output
            for tensor in inputs:
                tensor.grad = None
        result: Row = {
            "forward_ms": statistics.fmean(forward),
            "backward_ms": statistics.fmean(backward),
            "forward_std_ms": statistics.pstdev(forward),
            "backward_std_ms": statistics.pstdev(backward),
        }
        if device.type == "cuda":
            result["memory_MB"] = (held + 4 * q.numel() * q.element_size()) / 1e6
        return result | {"status": "ok"}

    predicted = predicted_bytes(attention, batch_size, seq, dim, getattr(torch, dtype).itemsize)
    if not (compiled and attention == "plain"):  # there the compiler chooses what to keep and what to compute again
        row["predicted_MB"] = predicted / 1e6
    return row | guarded(measure)


def predicted_bytes(attention: AttentionName, batch_size: int, seq: int, dim: int, bytes_per_number: int) -> int:
    """What an eager attention holds just before its backward pass, in bytes, one head a sequence.

    All hold Q, K, V, the output and its gradient. Plain attention adds two squares for each sequence (the
    exponentials of the scores, which the softmax keeps, and the probabilities), the exponentials' row sums, and
    one mask of a byte an entry. The others add the log-sum-exp of each row in float32.
    """
    tensors = 5 * batch_size * seq * dim * bytes_per_number
    if attention == "plain":
        return tensors + batch_size * (2 * seq * seq + seq) * bytes_per_number + seq * seq
    return tensors + batch_size * seq * 4


def guarded(function: Callable[[], Row]) -> Row:
    """The row that `function` measures, or one whose status is "out of memory" or "unsupported"."""

    def attempt() -> Row:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                return function()
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                if "out of memory" in str(error):  # as compilers wrap it
                    raise torch.OutOfMemoryError(str(error)) from error
                if "CUDA error" in str(error):  # the device is lost: no later row would mean anything
                    raise
                return {"status": UNSUPPORTED, "reason": _reason(error, [str(one.message) for one in caught])}

    return or_out_of_memory(attempt)


def save_quietly(folder: Path, name: str, what: str, rows: list[Row], device: torch.device, **extra: object) -> None:
    """Write the rows so far, so that an interrupted run keeps them; only the last writing is announced."""
    with contextlib.redirect_stdout(None):
        write_result(folder, name, what, rows, device, **extra)


def check_options(command: object, *names: str, least: int = 1) -> None:
    """Raise a ValueError if one of these numbers (or tuples of numbers) of a command is below `least`."""
    options = asdict(command)  # type: ignore[call-overload]
    for name in names:
        values = options[name] if isinstance(options[name], tuple) else (options[name],)
        if not values:
            raise ValueError(f"{name} is empty, but must name at least one value")
        if min(values) < least:
            raise ValueError(f"{name} has {min(values)}, but must be at least {least}")


def in_columns(rows: list[Row], titles: dict[str, str]) -> list[Row]:
    """The rows with these columns alone, in this order and under these titles, for a table."""
    present = {key: title for key, title in titles.items() if any(key in row for row in rows)}
    return [{title: row.get(key) for key, title in present.items()} for row in rows]


def print_reasons(rows: list[Row], key: str) -> None:
    """Say once for each value of `key` why rows of it have no times."""
    for line in dict.fromkeys(f"{row[key]}: {row['reason']}" for row in rows if "reason" in row):
        print(line)


def _now(device: torch.device) -> float:
    synchronize(device)
    return time.perf_counter()


def _reason(error: Exception, warned: list[str]) -> str:
    """The first line that says why; PyTorch warns of what its kernels lack before it raises "no kernel"."""
    lines = [text.splitlines()[0].split(" (Triggered")[0] for text in warned if text]
    why = [line for line in lines if not line.endswith("because:") and "runtime disabled" not in line]
    if "o available kernel" in str(error) and why:
        return why[0]
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
