"""Time FlashAttention, plain attention and PyTorch's fused kernels over a grid: time, TFLOP/s and peak memory."""

from collections.abc import Callable
from typing import Literal

import torch
import torch._functorch.config as functorch_config
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as torch_attention

from cs336_basics.model import CausalAttention
from cs336_basics.strategy import resolve_device
from cs336_systems.instruments.measure import (
    OK,
    Row,
    cartesian,
    median_ms,
    peak_bytes,
    print_table,
    result_file,
    run_grid,
    try_measure,
)
from cs336_systems.instruments.options.common import check_options
from cs336_systems.instruments.options.one_gpu import BenchFlash
from cs336_systems.theory.activations import attention_flops
from cs336_systems.theory.units import MB
from cs336_systems.training.choices import ATTENTIONS, AttentionName, Precision, resolve

FlashPass = Literal["forward", "backward", "both"]

#: Status of a row whose output or gradients are not those of attention. Its times are not measured.
WRONG = "wrong"
#: Longest sequence whose results are checked: the check needs all scores in float32.
CHECKED_SEQ = 4096
#: The largest error that passes, as a share of the largest entry; bfloat16 and TF32 stay far below it.
TOLERANCE = 0.05


def run(options: BenchFlash) -> None:
    """Measure, print a table per dtype and width, and write a file."""
    check_options(options, "seqs", "dims", "heads", "rep_ms")
    device = resolve_device(options.device)
    cases = cartesian(dtype=options.dtypes, dim=options.dims, seq=options.seqs, attention=options.attentions)
    precision = torch.get_float32_matmul_precision()
    what = "causal attention, batch 1: medians of do_bench, causal FLOPs, MB of 10^6 bytes"
    file = result_file(options, what, device, heads=options.heads, float32_matmul_precision=precision)

    def measure(case: Row) -> Row:
        return flash_row(
            case["attention"], options.heads, case["seq"], case["dim"], case["dtype"], device, options.rep_ms
        )

    rows = run_grid(cases, measure, file)
    columns = (
        "seq", "attention", "forward_ms", "backward_ms", "both_ms", "forward_TFLOP/s", "both_TFLOP/s", "peak_MB",
    )  # fmt: skip
    for table in cartesian(dtype=options.dtypes, dim=options.dims):
        chosen = [row for row in rows if row.items() >= table.items()]
        print_table("causal attention", chosen, columns, common=table | {"heads": options.heads})
    file.announce()


def flash_row(
    attention: AttentionName, heads: int, seq: int, dim: int, dtype: Precision, device: torch.device, rep_ms: int
) -> Row:
    """Check, then time, one implementation on [1 heads seq dim] random inputs.

    Returns:
        "error" (see `largest_error`) up to `CHECKED_SEQ`; for "forward", "backward" and "both" the median in ms and
        TFLOP/s; on a GPU "peak_MB", the most that tensors held in forward and backward pass, inputs included; "status"
        and, if it is not "ok", usually a "reason". What was measured before memory ran out stays in the row.
    """
    if attention == "flex":
        torch.compiler.reset()  # torch.compile keeps a limited number of kernels of earlier shapes
    attend = resolve(ATTENTIONS, attention)
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
            result["peak_MB"] = peak_bytes(lambda: with_gradients(attend, *tensors), device) / MB
        output = attend(q, k, v)
        # Gradients are returned, not accumulated, which would take another kernel.
        result |= speed("backward", lambda: torch.autograd.grad(output, (q, k, v), d_out, retain_graph=True))
        del output
        return result | speed("both", lambda: with_gradients(attend, *tensors))

    def speed(which: FlashPass, function: Callable[[], object]) -> Row:
        ms = median_ms(function, device, rep_ms=rep_ms)
        return {f"{which}_ms": ms, f"{which}_TFLOP/s": attention_flops(heads, seq, dim, which) / ms / 1e9}

    row: Row = {}
    # A compiled backward pass that reuses the forward pass's buffers could not be called repeatedly.
    with functorch_config.patch(donated_buffer=False):
        for part in (check, forward, backward):
            row |= try_measure(part)
            if row["status"] != OK:
                break
    return row


def random_inputs(
    *shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw Q, K and V, which require gradients, and a gradient of the output, all standard normal of one shape."""
    generator = torch.Generator(device).manual_seed(seed)
    q, k, v, d_out = (torch.randn(shape, generator=generator, dtype=dtype, device=device) for _ in range(4))
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), d_out


def with_gradients(attend: CausalAttention, q: Tensor, k: Tensor, v: Tensor, d_out: Tensor) -> tuple[Tensor, ...]:
    """Return the output, and the gradients of q, k and v."""
    output = attend(q, k, v)
    return output, *torch.autograd.grad(output, (q, k, v), d_out)


def largest_error(attend: CausalAttention, q: Tensor, k: Tensor, v: Tensor, d_out: Tensor) -> float:
    """Return the largest difference of output or gradients from float32 attention, relative to its largest entry."""

    def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return torch_attention(q, k, v, is_causal=True)

    wide_q, wide_k, wide_v = (tensor.detach().float().requires_grad_() for tensor in (q, k, v))
    expected = with_gradients(reference, wide_q, wide_k, wide_v, d_out.float())
    actual = with_gradients(attend, q, k, v, d_out)
    errors = [((a.float() - e).abs().max() / e.abs().max()).item() for a, e in zip(actual, expected, strict=True)]
    return float(torch.tensor(errors).max())  # unlike max(), keeps NaN


def check_row(attend: CausalAttention, q: Tensor, k: Tensor, v: Tensor, d_out: Tensor) -> Row:
    """Return {"error": …}, or status "wrong" if the error is above `TOLERANCE` or NaN."""
    error = largest_error(attend, q, k, v, d_out)
    if error <= TOLERANCE:
        return {"error": error}
    return {"status": WRONG, "reason": f"output or gradients are off by {error:.2g} of the largest entry"}
