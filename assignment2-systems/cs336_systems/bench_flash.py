"""FlashAttention beside plain attention and PyTorch's fused kernels: time, TFLOP/s and peak memory over a grid."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch._functorch.config as functorch_config
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as torch_attention

from cs336_basics.model import CausalAttention
from cs336_basics.strategy import resolve_device
from cs336_systems.attention import AttentionName, causal_attention
from cs336_systems.bench_attention import DType
from cs336_systems.measure import (
    OK,
    Measurement,
    Row,
    check_options,
    gpu_or_cpu,
    grid,
    guarded,
    median_ms,
    peak_bytes,
    run_grid,
    show,
)

FlashPass = Literal["forward", "backward", "both"]

#: What stands in a row where output or gradients are not those of attention. Its times are not measured.
WRONG = "wrong"
#: Longest sequence whose results are checked: the check needs all scores in float32.
CHECKED_SEQ = 4096
#: The largest error that passes, as a share of the largest entry; bfloat16 and TF32 stay far below it.
TOLERANCE = 0.05


@dataclass(frozen=True)
class BenchFlash(Measurement):
    """Time attention kernels over sequence lengths, widths and dtypes; batch 1, causal."""

    attentions: tuple[AttentionName, ...] = gpu_or_cpu(
        ("plain", "flash", "sdpa-flash", "sdpa-cudnn", "sdpa-efficient", "flex"),
        ("plain", "flash-pytorch", "sdpa-flash"),
    )
    """plain: Assignment 1's. flash: ours. flash-pytorch: its reference. sdpa-*, flex: PyTorch's."""
    dtypes: tuple[DType, ...] = ("bfloat16", "float32")
    """Precisions of queries, keys and values."""
    dims: tuple[int, ...] = gpu_or_cpu((16, 32, 64, 128), (64,))
    """Widths of a head."""
    seqs: tuple[int, ...] = gpu_or_cpu(tuple(2**power for power in range(7, 17)), (128, 256))
    """Sequence lengths."""
    heads: int = 1
    """Heads. The leaderboard has 16."""
    rep_ms: int = gpu_or_cpu(100, 20)
    """How long each median is measured, in ms."""
    name: str = "bench_flash"

    def execute(self) -> None:
        check_options(self, "seqs", "dims", "heads", "rep_ms")
        device = resolve_device(self.device)
        cases = grid(dtype=self.dtypes, dim=self.dims, seq=self.seqs, attention=self.attentions)
        precision = torch.get_float32_matmul_precision()
        file = self.result_file(
            "causal attention, batch 1: medians of do_bench, causal FLOPs, MB of 10^6 bytes", device,
            heads=self.heads, float32_matmul_precision=precision,
        )  # fmt: skip

        def measure(case: Row) -> Row:
            return flash_row(
                case["attention"], self.heads, case["seq"], case["dim"], case["dtype"], device, self.rep_ms
            )

        rows = run_grid(cases, measure, file)
        columns = (
            "seq", "attention", "forward_ms", "backward_ms", "both_ms", "forward_TFLOP/s", "both_TFLOP/s", "peak_MB",
        )  # fmt: skip
        for table in grid(dtype=self.dtypes, dim=self.dims):
            chosen = [row for row in rows if row.items() >= table.items()]
            show("causal attention", chosen, columns, common=table | {"heads": self.heads})
        file.announce()


def flash_row(
    attention: AttentionName, heads: int, seq: int, dim: int, dtype: DType, device: torch.device, rep_ms: int
) -> Row:
    """Check, then time, one implementation on [1 heads seq dim] random inputs.

    Returns:
        "error" (see `largest_error`) up to `CHECKED_SEQ`; for "forward", "backward" and "both" the median in ms
        and TFLOP/s; on a GPU "peak_MB", the most that tensors held in forward and backward, inputs included (10^6
        bytes); "status" and, where it is not "ok", mostly a "reason". What was measured before memory ran out
        stays in the row.
    """
    if attention == "flex":
        torch.compiler.reset()  # kernels of earlier shapes, which torch.compile would keep only so many of
    attend = causal_attention(attention)
    tensors: list[Tensor] = []

    def check() -> Row:
        tensors.extend(random_inputs(1, heads, seq, dim, dtype=getattr(torch, dtype), device=device))
        return check_row(attend, *tensors) if seq <= CHECKED_SEQ else {}

    def forward() -> Row:
        q, k, v, _ = tensors
        return speed("forward", lambda: attend(q, k, v))

    def backward() -> Row:
        q, k, v, d_out = tensors
        result: Row = {}
        if device.type == "cuda":
            result["peak_MB"] = peak_bytes(lambda: with_gradients(attend, *tensors), device) / 1e6
        output = attend(q, k, v)
        # Gradients are returned, not accumulated: that would be another kernel.
        result |= speed("backward", lambda: torch.autograd.grad(output, (q, k, v), d_out, retain_graph=True))
        del output
        return result | speed("both", lambda: with_gradients(attend, *tensors))

    def speed(which: FlashPass, function: Callable[[], object]) -> Row:
        ms = median_ms(function, device, rep_ms=rep_ms)
        return {f"{which}_ms": ms, f"{which}_TFLOP/s": attention_flops(heads, seq, dim, which) / ms / 1e9}

    row: Row = {}
    # A compiled backward pass that reuses the forward's buffers could not be called over and over.
    with functorch_config.patch(donated_buffer=False):
        for part in (check, forward, backward):
            row |= guarded(part)
            if row["status"] != OK:
                break
    return row


def attention_flops(heads: int, seq: int, dim: int, which: FlashPass = "forward") -> float:
    """FLOPs of causal attention: two products of 2 · seq² · dim a head, half of it masked; backward has 2.5 times."""
    forward = heads * 2 * (2 * seq * seq * dim) / 2
    return forward * {"forward": 1.0, "backward": 2.5, "both": 3.5}[which]


def random_inputs(
    *shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Q, K and V that ask for gradients, and a gradient of the output, of one shape, standard normal."""
    generator = torch.Generator(device).manual_seed(seed)
    q, k, v, d_out = (torch.randn(shape, generator=generator, dtype=dtype, device=device) for _ in range(4))
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), d_out


def with_gradients(attend: CausalAttention, q: Tensor, k: Tensor, v: Tensor, d_out: Tensor) -> tuple[Tensor, ...]:
    """The output, and the gradients of q, k and v."""
    output = attend(q, k, v)
    return output, *torch.autograd.grad(output, (q, k, v), d_out)


def largest_error(attend: CausalAttention, q: Tensor, k: Tensor, v: Tensor, d_out: Tensor) -> float:
    """The largest difference of output or gradients from float32 attention, relative to its largest entry."""

    def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return torch_attention(q, k, v, is_causal=True)

    wide_q, wide_k, wide_v = (tensor.detach().float().requires_grad_() for tensor in (q, k, v))
    expected = with_gradients(reference, wide_q, wide_k, wide_v, d_out.float())
    actual = with_gradients(attend, q, k, v, d_out)
    errors = [((a.float() - e).abs().max() / e.abs().max()).item() for a, e in zip(actual, expected, strict=True)]
    return float(torch.tensor(errors).max())  # unlike max(), keeps a nan


def check_row(attend: CausalAttention, q: Tensor, k: Tensor, v: Tensor, d_out: Tensor) -> Row:
    """{"error": …}, or status "wrong" if it is above `TOLERANCE` or no number."""
    error = largest_error(attend, q, k, v, d_out)
    if error <= TOLERANCE:
        return {"error": error}
    return {"status": WRONG, "reason": f"output or gradients are off by {error:.2g} of the largest entry"}
