"""Time attention alone, eager and compiled: each pass by itself, and the memory held for the backward pass."""

import statistics

import torch

from cs336_basics.strategy import resolve_device
from cs336_systems.instruments.measure import Row, cartesian, now_ms, print_table, result_file, run_grid
from cs336_systems.instruments.options.common import check_options
from cs336_systems.instruments.options.one_gpu import AttentionMode, BenchAttention
from cs336_systems.theory.activations import attention_bytes
from cs336_systems.theory.units import MB
from cs336_systems.training.choices import ATTENTIONS, AttentionName, Precision, resolve


def run(options: BenchAttention) -> None:
    """Measure, print a table and write a file."""
    check_options(options, "seqs", "dims", "batch_size", "steps")
    check_options(options, "warmup", least=0)
    device = resolve_device(options.device)
    axes = {"attention": options.attentions, "mode": options.modes, "dtype": options.dtypes, "dim": options.dims}
    cases = cartesian(**axes, seq=options.seqs)
    settings = list(cases[0]) if cases else []
    for case in cases:
        if case["mode"] == "eager":  # a compiler chooses what to keep and what to compute again
            case["predicted_MB"] = predicted_bytes(options.batch_size, case) / MB
    common = {"batch_size": options.batch_size, "heads": 1, "steps": options.steps}
    what = "forward and backward passes of causal attention, each by itself"
    file = result_file(options, what, device, **common)

    def measure(case: Row) -> Row:
        return time_attention(
            case["attention"], case["mode"], case["dtype"], options.batch_size, case["seq"], case["dim"], device,
            options.warmup, options.steps,
        )  # fmt: skip

    rows = run_grid(cases, measure, file)
    columns = [*settings, "forward_ms", "backward_ms", "memory_MB", "predicted_MB"]
    print_table("causal attention", rows, columns, settings=settings, common=common)
    file.announce()


def predicted_bytes(batch_size: int, case: Row) -> int:
    """Predict what a case holds just before its backward pass, in bytes; only plain attention keeps its scores."""
    number = getattr(torch, case["dtype"]).itemsize
    return attention_bytes(batch_size, case["seq"], case["dim"], number, keeps_scores=case["attention"] == "plain")


def time_attention(
    attention: AttentionName,
    mode: AttentionMode,
    dtype: Precision,
    batch_size: int,
    seq: int,
    dim: int,
    device: torch.device,
    warmup: int,
    steps: int,
) -> Row:
    """Time forward and backward passes of one shape, each by itself and synchronized.

    Returns:
        Means and standard deviations in ms. On a GPU "memory_MB" is what tensors hold when the backward pass is about
        to start, without the workspaces of cuBLAS, which stay between calls.
    """
    attend = resolve(ATTENTIONS, attention)
    if mode == "compiled":
        torch.compiler.reset()  # torch.compile keeps a limited number of kernels of earlier shapes
        attend = torch.compile(attend, dynamic=False)
    # PyTorch's fused kernels need a dimension for the heads.
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
        row["memory_MB"] = (held + 4 * q.numel() * q.element_size()) / MB
    return row


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
