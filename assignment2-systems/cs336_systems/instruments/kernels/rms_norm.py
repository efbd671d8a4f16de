"""Time RMSNorm by our kernels against Assignment 1's and PyTorch's, eager and compiled; bfloat16 rows, float32 weight.

`forward_GB_per_s` counts x read and y written. `extra_MiB` is the peak memory of forward and backward pass minus what
was held before.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import tyro
from torch.nn import functional as F

from cs336_systems.instruments.kernels.comparison import compare, eager_and_compiled
from cs336_systems.instruments.measure import Row, extra_bytes, median_ms
from cs336_systems.instruments.options.common import Measurement
from cs336_systems.kernels.rms_norm import rms_norm, rms_norm_reference
from cs336_systems.theory.units import MIB
from cs336_systems.training.options import gpu_or_cpu

#: Rows and d_model.
SHAPES = ((8192, 768), (32_768, 768), (8192, 1600), (32_768, 1600), (8192, 4096), (32_768, 4096))
EPS = 1e-5


@dataclass(frozen=True)
class Options(Measurement):
    """Time RMSNorm by our kernels against Assignment 1's and PyTorch's."""

    shapes: tuple[tuple[int, int], ...] = gpu_or_cpu(SHAPES, ((9, 48),))
    """Rows and d_model of each case."""
    name: str = "rms_norm"


def torch_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Compute the norm with PyTorch's fused kernel, which needs one dtype and is slow with a float32 weight."""
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)


def measure(norm: Callable[..., torch.Tensor], case: Row, device: torch.device) -> Row:
    """Time one implementation at one shape."""
    shape = case["rows"], case["d_model"]
    rng = torch.Generator(device).manual_seed(0)
    options: dict[str, Any] = {"generator": rng, "device": device}
    x = torch.randn(shape, dtype=torch.bfloat16, **options).requires_grad_()
    dy = torch.randn(shape, dtype=torch.bfloat16, **options)
    weight = torch.rand(shape[1], **options).requires_grad_()

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return norm(x, weight, EPS)

    def both() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(norm(x, weight, EPS), (x, weight), dy)

    row = {"forward_ms": median_ms(forward, device), "forward_backward_ms": median_ms(both, device)}
    row["forward_GB_per_s"] = 2 * x.numel() * x.element_size() / row["forward_ms"] / 1e6
    if device.type == "cuda":
        row["extra_MiB"] = extra_bytes(both, device) / MIB
    return row


def main(options: Options) -> None:
    """Measure, print a table and write a file."""
    cases = [dict(zip(("rows", "d_model"), shape)) for shape in options.shapes]
    functions = {"ours": rms_norm, "assignment_1": rms_norm_reference, "torch": torch_norm}
    what = "RMSNorm of bfloat16 rows with a float32 weight"
    compare(options, what, cases, lambda: eager_and_compiled(**functions), measure)


if __name__ == "__main__":
    main(tyro.cli(Options))
