"""FlashAttention in float32: what its kernels gain by making a product of three TF32 products, and what that costs in
accuracy.

    python -m benchmarks.flash_float32 [--dims 16 32 64 128] [--heads 16] [--sequence 2048] [--out results]

Causal, each kernel alone, beside products without tensor cores; and PyTorch's memory-efficient attention, which also
makes them of three. Errors are ‖x - y‖ / ‖y‖ from attention in float64.
"""

import argparse
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.flash_tiles import PRODUCTS, launcher, relative_error
from cs336_systems.attention import causal_attention
from cs336_systems.bench_flash import with_gradients
from cs336_systems.flash_attention import triton_ops as ops
from cs336_systems.flash_attention.triton_ops import Tiles
from cs336_systems.measure import median_ms, show, write_result

#: The best tiles for products without tensor cores, of 16 to 64 rows and 4 to 16 warps.
WITHOUT_TENSOR_CORES = Tiles(32, 32, 8, 2)
#: What each kernel writes, of O, dQ, dK and dV.
WRITES = {"forward": (0,), "dkdv": (2, 3), "dq": (1,)}


def kernel_rows(inputs: Sequence[Tensor], expected: Sequence[Tensor], rep_ms: int) -> Iterator[dict[str, Any]]:
    """A row for each kernel and way to multiply."""
    d = inputs[0].shape[-1]
    for precision, kernel in product(("ieee", "tf32x3"), PRODUCTS):
        run, written = launcher(kernel, *inputs)
        tiles = ops.FLOAT32_TILES[kernel, d] if precision == "tf32x3" else WITHOUT_TENSOR_CORES
        with mock.patch.object(ops, "precision_of", lambda dtype, precision=precision: precision):
            run(tiles)
            errors = [relative_error(x, expected[which]) for x, which in zip(written, WRITES[kernel])]
            ms = median_ms(partial(run, tiles), inputs[0].device, rep_ms=rep_ms)
        yield {
            "d": d, "kernel": kernel, "precision": precision, "queries": tiles.queries, "keys": tiles.keys,
            "warps": tiles.warps, "error": max(errors), "ms": ms,
        }  # fmt: skip


def peer_row(inputs: Sequence[Tensor], expected: Sequence[Tensor], rep_ms: int) -> dict[str, Any]:
    """PyTorch's memory-efficient attention, forward and backward pass."""
    q, k, v = (x.requires_grad_() for x in inputs[:3])
    run = partial(with_gradients, causal_attention("sdpa-efficient"), q, k, v, inputs[3])
    largest = max(relative_error(x, y) for x, y in zip(run(), expected))
    ms = median_ms(run, inputs[0].device, rep_ms=rep_ms)
    return {"d": inputs[0].shape[-1], "kernel": "PyTorch's, forward and backward", "error": largest, "ms": ms}


def in_float64(q: Tensor, k: Tensor, v: Tensor, do: Tensor) -> tuple[Tensor, ...]:
    """O, dQ, dK and dV."""
    wide_q, wide_k, wide_v = (x.double().requires_grad_() for x in (q, k, v))
    return with_gradients(causal_attention("plain"), wide_q, wide_k, wide_v, do.double())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--sequence", type=int, default=2048)
    parser.add_argument("--rep-ms", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("results"))
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    for d in arguments.dims:
        inputs = [torch.randn(1, arguments.heads, arguments.sequence, d, device="cuda") for _ in range(4)]
        expected = in_float64(*inputs)
        rows += kernel_rows(inputs, expected, arguments.rep_ms)
        rows.append(peer_row(inputs, expected, arguments.rep_ms))
    what = f"float32 FlashAttention, {arguments.heads} x {arguments.sequence}, causal"
    show(what, rows)
    write_result(arguments.out, "flash_float32", what, rows, torch.device("cuda"))


if __name__ == "__main__":
    main()
