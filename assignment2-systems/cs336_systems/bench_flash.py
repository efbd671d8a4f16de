"""FlashAttention beside plain attention and PyTorch's fused kernels: time, TFLOP/s and peak memory over a grid."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
import torch._functorch.config as functorch_config
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as torch_attention

from cs336_basics.model import CausalAttention
from cs336_systems.attention import AttentionName, causal_attention
from cs336_systems.bench_attention import DType, check_options, guarded, in_columns, print_reasons, save_quietly
from cs336_systems.measure import Row, default_device, median_ms, peak_bytes, show, write_result

#: flex: PyTorch's FlexAttention, compiled, with a causal block mask.
Implementation = AttentionName | Literal["flex"]
Pass = Literal["forward", "backward", "both"]

#: What stands in a row where output or gradients are not those of attention. Its times are not measured.
WRONG = "wrong"
#: Longest sequence whose results are checked: the check needs all scores in float32.
CHECKED_SEQ = 4096
#: The largest error that passes, as a share of the largest entry; bfloat16 and TF32 stay far below it.
TOLERANCE = 0.05
#: The columns that fit a terminal, and their titles there.
_SHOWN = {
    "seq": "seq", "implementation": "attention", "forward_ms": "forward", "backward_ms": "backward",
    "both_ms": "both", "forward_TFLOP/s": "TFLOP/s forward", "both_TFLOP/s": "TFLOP/s both", "peak_MB": "peak",
    "status": "status",
}  # fmt: skip


@dataclass(frozen=True)
class BenchFlash:
    """Time attention kernels over sequence lengths, widths and dtypes; batch 1, causal."""

    seqs: tuple[int, ...] = tuple(2**power for power in range(7, 17))
    """Sequence lengths."""
    dims: tuple[int, ...] = (16, 32, 64, 128)
    """Widths of a head."""
    dtypes: tuple[DType, ...] = ("bfloat16", "float32")
    """Precisions of queries, keys and values."""
    heads: int = 1
    """Heads. The leaderboard has 16."""
    implementations: tuple[Implementation, ...] = ("plain", "flash", "sdpa-flash", "sdpa-cudnn", "flex")
    """plain: Assignment 1's attention. flash: ours. flash-pytorch: its reference. sdpa-*: PyTorch's
    FlashAttention-2 and cuDNN kernels. flex: FlexAttention, compiled."""
    rep_ms: int = 100
    """How long each median is measured, in ms."""
    name: str = "bench_flash"
    """The result is written to <out>/<name>.json."""
    out: Path = Path("results")
    """Folder for the result."""

    def execute(self) -> None:
        check_options(self, "seqs", "dims", "heads", "rep_ms")
        device = default_device()
        what = f"causal attention, batch 1, heads {self.heads}: median times of do_bench, causal FLOPs"
        extra = {"float32_matmul_precision": torch.get_float32_matmul_precision()}
        rows: list[Row] = []
        cases = list(product(self.dtypes, self.dims, self.seqs, self.implementations))
        with _progress() as progress:
            task = progress.add_task("", total=len(cases))
            for dtype, dim, seq, implementation in cases:
                progress.update(task, description=f"{implementation}, {dtype}, d {dim}, seq {seq}")
                rows.append(flash_row(implementation, self.heads, seq, dim, dtype, device, self.rep_ms))
                progress.advance(task)
                if len(rows) % len(self.implementations) == 0:
                    save_quietly(self.out, self.name, what, rows, device, **extra)
        for dtype, dim in product(self.dtypes, self.dims):
            chosen = [row for row in rows if (row["dtype"], row["dim"]) == (dtype, dim)]
            title = f"{dtype}, d {dim}, heads {self.heads}; forward, backward and both in ms, TFLOP/s, peak in MB"
            show(title, in_columns(chosen, _SHOWN))
        print_reasons(rows, "implementation")
        write_result(self.out, self.name, what, rows, device, **extra)


def flash_row(
    implementation: Implementation, heads: int, seq: int, dim: int, dtype: DType, device: torch.device, rep_ms: int
) -> Row:
    """Check, then time, one implementation on [1 heads seq dim] random inputs.

    Returns:
        The shape; "error" (see `largest_error`) up to `CHECKED_SEQ`; for "forward", "backward" and "both" the
        median in ms and TFLOP/s; on a GPU "peak_MB", the most that tensors held in forward and backward, inputs
        included (10^6 bytes); "status" and, where it is not "ok", mostly a "reason". What was measured before
        memory ran out stays in the row.
    """
    row: Row = {"implementation": implementation, "dtype": dtype, "heads": heads, "dim": dim, "seq": seq}
    attend: CausalAttention
    tensors: tuple[Tensor, ...]

    def prepare() -> Row:
        nonlocal attend, tensors
        if implementation == "flex":
            torch.compiler.reset()  # kernels of earlier shapes, which torch.compile would keep only so many of
        attend = find(implementation, seq, device)
        tensors = random_inputs(1, heads, seq, dim, dtype=getattr(torch, dtype), device=device)
        return {}

    def check() -> Row:
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

    def speed(which: Pass, function: Callable[[], object]) -> Row:
        ms = median_ms(function, device, rep_ms=rep_ms)
        return {f"{which}_ms": ms, f"{which}_TFLOP/s": attention_flops(heads, seq, dim, which) / ms / 1e9}

    # A compiled backward pass that reuses the forward's buffers could not be called over and over.
    with functorch_config.patch(donated_buffer=False):
        for part in (prepare, check, forward, backward):
            row |= {"status": "ok"} | guarded(part)
            if row["status"] != "ok":
                break
    return row


def attention_flops(heads: int, seq: int, dim: int, which: Pass = "forward") -> float:
    """FLOPs of causal attention: two products of 2 · seq² · dim a head, half of it masked; backward has 2.5 times."""
    forward = heads * 2 * (2 * seq * seq * dim) / 2
    return forward * {"forward": 1.0, "backward": 2.5, "both": 3.5}[which]


def find(implementation: Implementation, seq: int, device: torch.device) -> CausalAttention:
    """The attention of that name for sequences of `seq`, on [batch heads seq d] tensors."""
    if implementation == "flex":
        from torch.nn.attention.flex_attention import flex_attention

        flex = torch.compile(flex_attention, dynamic=False)
        block_mask = _causal_block_mask(seq, device)
        return lambda q, k, v: flex(q, k, v, block_mask=block_mask)
    return causal_attention(implementation)


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


@functools.cache
def _causal_block_mask(seq: int, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    def causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query >= key

    # Compiled, it never holds the [seq seq] mask, of 4 GB at 65536.
    create = torch.compile(create_block_mask) if device.type == "cuda" else create_block_mask
    return create(causal, None, None, seq, seq, device=device.type)


def _progress() -> Progress:
    console = Console(stderr=True)
    return Progress(
        MofNCompleteColumn(), BarColumn(bar_width=20), TimeElapsedColumn(), TextColumn("{task.description}"),
        console=console, transient=True, disable=not console.is_terminal,
    )  # fmt: skip
