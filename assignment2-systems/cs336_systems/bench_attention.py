"""Attention alone, eager and compiled: the time of each pass, and the memory that waits for the backward pass."""

import statistics
from dataclasses import dataclass
from typing import Literal

import torch

from cs336_basics.strategy import resolve_device
from cs336_systems.attention import AttentionName, causal_attention
from cs336_systems.measure import (
    Measurement,
    Row,
    check_options,
    gpu_or_cpu,
    grid,
    now_ms,
    run_grid,
    show,
)
from cs336_systems.training_step import Mode

DType = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class BenchAttention(Measurement):
    """Time causal attention alone, and measure what it holds for its backward pass."""

    attentions: tuple[AttentionName, ...] = ("plain",)
    """plain: Assignment 1's. flash: ours. flash-pytorch: its reference. sdpa-*, flex: PyTorch's."""
    modes: tuple[Mode, ...] = gpu_or_cpu(("eager", "compiled"), ("eager",))
    """The functions as they are, or under torch.compile."""
    dtypes: tuple[DType, ...] = ("float32",)
    """Precisions of queries, keys and values."""
    dims: tuple[int, ...] = gpu_or_cpu((16, 32, 64, 128), (16, 64))
    """Widths of a head."""
    seqs: tuple[int, ...] = gpu_or_cpu((256, 1024, 4096, 8192, 16384), (128, 256))
    """Sequence lengths."""
    batch_size: int = 8
    """Sequences at once, of one head each."""
    warmup: int = 5
    """Passes before the clock starts."""
    steps: int = gpu_or_cpu(100, 20)
    """Forward and backward passes that are timed."""
    name: str = "bench_attention"

    def execute(self) -> None:
        check_options(self, "seqs", "dims", "batch_size", "steps")
        check_options(self, "warmup", least=0)
        device = resolve_device(self.device)
        cases = grid(attention=self.attentions, mode=self.modes, dtype=self.dtypes, dim=self.dims, seq=self.seqs)
        settings = list(cases[0]) if cases else []
        for case in cases:
            if case["mode"] == "eager":  # a compiler chooses what to keep and what to compute again
                held = predicted_bytes(case["attention"], self.batch_size, case["seq"], case["dim"], case["dtype"])
                case["predicted_MB"] = held / 1e6
        common = {"batch_size": self.batch_size, "heads": 1, "steps": self.steps}
        file = self.result_file("forward and backward passes of causal attention, each by itself", device, **common)

        def measure(case: Row) -> Row:
            return time_attention(
                case["attention"], case["mode"], case["dtype"], self.batch_size, case["seq"], case["dim"], device,
                self.warmup, self.steps,
            )  # fmt: skip

        rows = run_grid(cases, measure, file)
        columns = [*settings, "forward_ms", "backward_ms", "memory_MB", "predicted_MB"]
        show("causal attention", rows, columns, settings=settings, common=common)
        file.announce()


def time_attention(
    attention: AttentionName,
    mode: Mode,
    dtype: DType,
    batch_size: int,
    seq: int,
    dim: int,
    device: torch.device,
    warmup: int,
    steps: int,
) -> Row:
    """Time forward and backward passes of one shape, each by itself and synchronised.

    Returns:
        Means and standard deviations in ms. On a GPU "memory_MB" is what tensors hold when the backward pass is
        about to start (10^6 bytes; without the workspaces of cuBLAS, which stay between calls).
    """
    attend = causal_attention(attention)
    if mode == "compiled":
        torch.compiler.reset()  # kernels of earlier shapes, which torch.compile would keep only so many of
        attend = torch.compile(attend, dynamic=False)
    # PyTorch's fused kernels insist on a dimension for the heads.
    shape = batch_size, 1, seq, dim
    q, k, v, d_out = (torch.randn(shape, device=device, dtype=getattr(torch, dtype)) for _ in range(4))
    inputs = [tensor.requires_grad_() for tensor in (q, k, v)]
    forward: list[float] = []
    backward: list[float] = []
    held = 0
    for _ in range(warmup + steps):
        before = _allocated(device)
        started = now_ms(device)
        output = attend(*inputs)
        computed = now_ms(device)
        held = _allocated(device) - before
        resumed = now_ms(device)
        output.backward(d_out)
        backward.append(now_ms(device) - resumed)
        forward.append(computed - started)
        del output
        for tensor in inputs:
            tensor.grad = None
    row: Row = {}
    for which, times in (("forward", forward[warmup:]), ("backward", backward[warmup:])):
        row |= {f"{which}_ms": statistics.fmean(times), f"{which}_std_ms": statistics.pstdev(times)}
    if device.type == "cuda":
        row["memory_MB"] = (held + 4 * q.numel() * q.element_size()) / 1e6
    return row


def predicted_bytes(attention: AttentionName, batch_size: int, seq: int, dim: int, dtype: DType) -> int:
    """What an eager attention holds just before its backward pass, in bytes, one head a sequence.

    All hold Q, K, V, the output and its gradient. Plain attention adds two squares for each sequence (the
    exponentials of the scores, which the softmax keeps, and the probabilities), the exponentials' row sums, and
    one mask of a byte an entry. The others add the log-sum-exp of each row in float32.
    """
    bytes_per_number = getattr(torch, dtype).itemsize
    tensors = 5 * batch_size * seq * dim * bytes_per_number
    if attention == "plain":
        return tensors + batch_size * (2 * seq * seq + seq) * bytes_per_number + seq * seq
    return tensors + batch_size * seq * 4


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
