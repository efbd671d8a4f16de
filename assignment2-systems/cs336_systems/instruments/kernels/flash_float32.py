"""Measure what three TF32 matmuls for one gain FlashAttention in float32, and what that costs in accuracy.

Each kernel alone, causal, in comparison with matmuls without tensor cores; and PyTorch's memory-efficient attention,
which also uses three TF32 matmuls. Errors are ‖x - y‖ / ‖y‖ relative to attention in float64.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from unittest import mock

import torch
import tyro
from torch import Tensor

from cs336_systems.instruments.flash import with_gradients
from cs336_systems.instruments.kernels.flash_tiles import MATMULS, launcher, relative_error
from cs336_systems.instruments.measure import Row, median_ms, print_table, write_result
from cs336_systems.instruments.options.common import Measurement
from cs336_systems.kernels.flash_attention import triton_ops as ops
from cs336_systems.kernels.flash_attention.triton_ops import Tiles
from cs336_systems.training.choices import ATTENTIONS, resolve

#: The best tiles for matmuls without tensor cores, of 16 to 64 rows and 4 to 16 warps.
WITHOUT_TENSOR_CORES = Tiles(32, 32, 8, 2)
#: Indices of the tensors that each kernel writes, among O, dQ, dK and dV.
WRITES = {"forward": (0,), "dkdv": (2, 3), "dq": (1,)}


def kernel_rows(inputs: Sequence[Tensor], expected: Sequence[Tensor], rep_ms: int) -> Iterator[Row]:
    """Measure a row for each kernel and precision of its matmuls."""
    d = inputs[0].shape[-1]
    for precision, kernel in product(("ieee", "tf32x3"), MATMULS):
        run, written = launcher(kernel, *inputs)
        tiles = ops.FLOAT32_TILES[kernel, d] if precision == "tf32x3" else WITHOUT_TENSOR_CORES
        with mock.patch.object(ops, "precision_of", lambda dtype, precision=precision: precision):
            run(tiles)
            errors = [relative_error(x, expected[which]) for x, which in zip(written, WRITES[kernel])]
            ms = median_ms(partial(run, tiles), inputs[0].device, rep_ms=rep_ms)
        yield {
            "d": d, "kernel": kernel, "precision": precision, "queries": tiles.block_m, "keys": tiles.block_n,
            "warps": tiles.warps, "error": max(errors), "ms": ms,
        }  # fmt: skip


def peer_row(inputs: Sequence[Tensor], expected: Sequence[Tensor], rep_ms: int) -> Row:
    """Measure the forward and backward pass of PyTorch's memory-efficient attention."""
    q, k, v = (x.requires_grad_() for x in inputs[:3])
    run = partial(with_gradients, resolve(ATTENTIONS, "sdpa-efficient"), q, k, v, inputs[3])
    largest = max(relative_error(x, y) for x, y in zip(run(), expected))
    ms = median_ms(run, inputs[0].device, rep_ms=rep_ms)
    return {"d": inputs[0].shape[-1], "kernel": "PyTorch's, forward and backward", "error": largest, "ms": ms}


def in_float64(q: Tensor, k: Tensor, v: Tensor, do: Tensor) -> tuple[Tensor, ...]:
    """Compute O, dQ, dK and dV in float64."""
    wide_q, wide_k, wide_v = (x.double().requires_grad_() for x in (q, k, v))
    return with_gradients(resolve(ATTENTIONS, "plain"), wide_q, wide_k, wide_v, do.double())


@dataclass(frozen=True)
class Options(Measurement):
    """Measure FlashAttention in float32 with and without tensor cores: time and accuracy. Needs an NVIDIA GPU."""

    dims: tuple[int, ...] = (16, 32, 64, 128)
    """Widths of a head."""
    heads: int = 16
    """Heads."""
    sequence: int = 2048
    """Sequence length."""
    rep_ms: int = 60
    """How long each median is measured, in ms."""
    name: str = "flash_float32"


def main(options: Options) -> None:
    """Measure, print a table and write a file."""
    torch.manual_seed(0)
    rows: list[Row] = []
    for d in options.dims:
        inputs = [torch.randn(1, options.heads, options.sequence, d, device="cuda") for _ in range(4)]
        expected = in_float64(*inputs)
        rows += kernel_rows(inputs, expected, options.rep_ms)
        rows.append(peer_row(inputs, expected, options.rep_ms))
    what = f"float32 FlashAttention, {options.heads} x {options.sequence}, causal"
    print_table(what, rows)
    write_result(options, what, rows, torch.device("cuda"))


if __name__ == "__main__":
    main(tyro.cli(Options))
