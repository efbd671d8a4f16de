"""RMSNorm by our kernels beside Assignment 1's and PyTorch's, eager and compiled; bfloat16 rows, float32 weight.

    python -m benchmarks.rms_norm [--out results] [--tiny]

`GB_per_s` of the forward pass counts x read and y written. `extra_MiB` is the peak of memory during forward
and backward less what was held before.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from cs336_basics.strategy import resolve_device
from cs336_systems.measure import extra_bytes, median_ms, or_out_of_memory, show, write_result
from cs336_systems.rms_norm import rms_norm, rms_norm_reference

#: (rows, d_model)
SHAPES = [(8192, 768), (32_768, 768), (8192, 1600), (32_768, 1600), (8192, 4096), (32_768, 4096)]
TINY = [(9, 48)]
EPS = 1e-5


def torch_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    # PyTorch's fused kernel wants one dtype; with a float32 weight it falls back to many small ones.
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)


def candidates() -> dict[str, Callable]:
    compiled = partial(torch.compile, fullgraph=True, dynamic=False)
    return {
        "ours": rms_norm,
        "ours, compiled": compiled(rms_norm),
        "assignment 1": rms_norm_reference,
        "assignment 1, compiled": compiled(rms_norm_reference),
        "torch": torch_norm,
        "torch, compiled": compiled(torch_norm),
    }


def measured(norm: Callable, shape: tuple[int, int], device: torch.device) -> dict:
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
        row["extra_MiB"] = extra_bytes(both, device) / 2**20
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for the result")
    parser.add_argument("--tiny", action="store_true", help="one small shape, which a CPU can do")
    arguments = parser.parse_args()
    device = resolve_device("auto")
    rows = []
    for shape in TINY if arguments.tiny else SHAPES:
        torch.compiler.reset()
        for who, norm in candidates().items():
            row = {"rows": shape[0], "d_model": shape[1], "who": who}
            rows.append(row | or_out_of_memory(partial(measured, norm, shape, device)))
    what = "RMSNorm of bfloat16 rows with a float32 weight"
    show(what, rows)
    if arguments.out:
        write_result(arguments.out, "rms_norm", what, rows, device)


if __name__ == "__main__":
    main()
