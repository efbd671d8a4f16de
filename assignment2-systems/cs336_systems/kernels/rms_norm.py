"""An exhibit that no training step uses: RMSNorm as two Triton kernels, forward and backward.

It is the smallest kernel here with a backward pass, and faster than eager PyTorch; but torch.compile writes an equally
fast kernel by itself and can fuse it with its neighbors (LOG.md). With r = 1 / √(mean(x²) + eps), x̂ = r x and weight w,
the output is y = x̂ ⊙ w, and its gradients are

    dx = r · (dy ⊙ w - x̂ · mean(dy ⊙ w ⊙ x̂))          dw = Σ over rows of dy ⊙ x̂

Both are limited by memory alone. The forward kernel reads x once and keeps r; the backward kernel reads x and dy once.

Source: Zhang & Sennrich 2019, "Root Mean Square Layer Normalization".
"""

# The arguments of kernels and autograd's contexts have no informative types.
# ruff: noqa: ANN001, ANN202

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from cs336_basics.model import RMSNorm
from cs336_systems.kernels.triton_support import check_device

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: A program holds a whole row in registers.
MAX_WIDTH = 16_384


def rms_norm_reference(
    x: Float[Tensor, "... d"], weight: Float[Tensor, " d"], eps: float = 1e-5
) -> Float[Tensor, "... d"]:
    """Compute RMSNorm in plain PyTorch."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def rms_norm(x: Float[Tensor, "... d"], weight: Float[Tensor, " d"], eps: float = 1e-5) -> Float[Tensor, "... d"]:
    """Compute x / √(mean(x²) + eps) · weight along the last dimension, in float32; return it in x's dtype.

    The same inputs give the same bits, including gradients.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or the tensors are where Triton cannot run.
    """
    _check_inputs(x, weight)
    y, _ = _forward(x, weight, eps)
    return y


class FusedRMSNorm(RMSNorm):
    """`cs336_basics.model.RMSNorm` through the kernels: same arguments, same parameter, same output dtype."""

    def forward(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        return rms_norm(x, self.weight, self.eps)


def _check_inputs(x: Tensor, weight: Tensor) -> None:
    # Plain `Tensor`s: this function is the check.
    if x.dim() < 1 or weight.dim() != 1 or x.shape[-1] != weight.shape[0]:
        raise ValueError(f"x is {tuple(x.shape)} and weight {tuple(weight.shape)}, but must be [... d] and [d]")
    if not 1 <= x.shape[-1] <= MAX_WIDTH:
        raise ValueError(
            f"rows are {x.shape[-1]} wide, but the kernel takes 1 to {MAX_WIDTH} columns: call rms_norm_reference"
        )
    if x.dtype not in _DTYPES or weight.dtype not in _DTYPES:
        raise ValueError(
            f"x is {x.dtype} and weight {weight.dtype}, but the kernel computes in float32, from float32, float16 or "
            "bfloat16: cast them with .to(), or use cs336_basics.model.RMSNorm"
        )
    if x.device != weight.device:
        raise ValueError(f"x and weight are on {x.device} and {weight.device}: move them to one device with .to()")
    check_device(x, "the tensors are", "move them to a GPU, call rms_norm_reference")


@torch.library.custom_op("cs336_systems::rms_norm", mutates_args=())
def _forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Compute the output [... d] in x's dtype, and 1 / √(mean(x²) + eps), [...] in float32."""
    x, weight = x.contiguous(), weight.contiguous()
    y, inverse_rms = _forward_outputs(x, weight, eps)
    if x.numel():
        with torch.cuda.device_of(x):
            _forward_kernel[(inverse_rms.numel(),)](
                x, weight, y, inverse_rms, x.shape[-1], float(eps), **_launch_options(x.shape[-1])
            )
    return y, inverse_rms


@_forward.register_fake
def _forward_outputs(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return (
        torch.empty(x.shape, device=x.device, dtype=x.dtype),
        torch.empty(x.shape[:-1], device=x.device, dtype=torch.float32),
    )


@torch.library.custom_op("cs336_systems::rms_norm_backward", mutates_args=())
def _backward(dy: Tensor, x: Tensor, weight: Tensor, inverse_rms: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the gradients of x, [... d], and of weight, [d]."""
    dy, x, weight = dy.contiguous(), x.contiguous(), weight.contiguous()
    d = x.shape[-1]
    options = _launch_options(d)
    # Each program sums dw over its own rows and writes the sum to its own row, without atomics, whose order, and so
    # whose rounding, differs from run to run. 32 warps per multiprocessor keep its memory busy.
    programs = 4
    if x.is_cuda:
        programs = torch.cuda.get_device_properties(x.device).multi_processor_count * (32 // options["num_warps"])
    programs = min(programs, inverse_rms.numel())
    dx = torch.empty_like(x)
    partial_dw = torch.empty(programs, d, device=x.device, dtype=torch.float32)
    if x.numel():
        with torch.cuda.device_of(x):
            _backward_kernel[(programs,)](dy, x, weight, inverse_rms, dx, partial_dw, inverse_rms.numel(), d, **options)
    return dx, partial_dw.sum(0).to(weight.dtype)


@_backward.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, inverse_rms: Tensor) -> tuple[Tensor, Tensor]:
    return (
        torch.empty(x.shape, device=x.device, dtype=x.dtype),
        torch.empty(weight.shape, device=x.device, dtype=weight.dtype),
    )


def _launch_options(d: int) -> dict[str, int]:
    block = triton.next_power_of_2(d)
    return {"BLOCK": block, "num_warps": min(32, max(1, block // 256))}  # 8 elements per thread, if possible


@no_type_check
def _setup_context(ctx, inputs, output) -> None:
    x, weight, _ = inputs
    _, inverse_rms = output
    ctx.save_for_backward(x, weight, inverse_rms)
    ctx.mark_non_differentiable(inverse_rms)
    ctx.set_materialize_grads(False)


@no_type_check
def _autograd(ctx, dy, _):
    return (*_backward(dy, *ctx.saved_tensors), None) if dy is not None else (None, None, None)


_forward.register_autograd(_autograd, setup_context=_setup_context)


@triton.jit
@no_type_check  # the shape checker of the tests wraps functions, and Triton needs the function itself
def _forward_kernel(x_ptr, weight_ptr, y_ptr, inverse_rms_ptr, d, eps, BLOCK: tl.constexpr):
    """Normalize one row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < d
    x = tl.load(x_ptr + row * d + columns, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    inverse_rms = 1.0 / tl.sqrt_rn(tl.sum(x * x, 0) / d + eps)
    tl.store(inverse_rms_ptr + row, inverse_rms)
    tl.store(y_ptr + row * d + columns, (x * inverse_rms * weight).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
@no_type_check
def _backward_kernel(dy_ptr, x_ptr, weight_ptr, inverse_rms_ptr, dx_ptr, partial_dw_ptr, rows, d, BLOCK: tl.constexpr):
    """Compute the gradients of rows p, p + P, p + 2P, ... for program p of P."""
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < d
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    dw = tl.zeros((BLOCK,), dtype=tl.float32)
    for row in range(program, rows, tl.num_programs(0)):
        offsets = tl.cast(row, tl.int64) * d + columns
        x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        inverse_rms = tl.load(inverse_rms_ptr + row)
        normalized = x * inverse_rms
        scaled = dy * weight
        dx = inverse_rms * (scaled - normalized * (tl.sum(scaled * normalized, 0) / d))
        tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        dw += dy * normalized
    tl.store(partial_dw_ptr + program * d + columns, dw, mask=inside)
