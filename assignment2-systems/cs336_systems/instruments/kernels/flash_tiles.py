"""Search for the tiles of each FlashAttention kernel: `TILES` of `triton_ops` come from here.

Causal, 16 heads, 16 384 tokens in bfloat16, 4096 in float32. Every candidate's result is compared with the first's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Literal

import torch
import tyro
from triton.runtime.errors import OutOfResources

from cs336_systems.instruments.measure import ResultFile, median_ms, print_table
from cs336_systems.instruments.options.common import Measurement
from cs336_systems.kernels.flash_attention import triton_ops as ops
from cs336_systems.kernels.flash_attention.triton_ops import Tiles
from cs336_systems.training.choices import Precision

#: Matmuls of [queries keys d] per kernel.
MATMULS = {"forward": 2, "dkdv": 4, "dq": 3}


def candidates(kernel: str, d: int, dtype: torch.dtype) -> list[Tiles]:
    """Return a space small enough to search in minutes, without tiles that exceed registers or shared memory."""
    if dtype == torch.float32:
        # Eight warps for large tiles only: at d = 128 a small tile caused an illegal memory access (Triton 3.6).
        return [
            Tiles(queries, keys, warps, 2)
            for queries, keys, warps in product((16, 32, 64, 128), (16, 32, 64, 128), (4, 8))
            if 2**16 <= queries * keys * max(d, 64) <= 2**20
            and queries * keys <= 2**13
            and (queries * keys * d <= 2**18 if warps == 4 else queries * keys * d >= 2**18)
        ]
    warps_of = {64 * 64: (4,), 64 * 128: (4, 8), 128 * 128: (8,), 64 * 32: (4,), 128 * 32: (4,)}
    space = []
    for queries, keys, stages in product((32, 64, 128), (32, 64, 128), (2, 3, 4)):
        looped = queries if kernel == "dkdv" else keys
        owned = keys if kernel == "dkdv" else queries
        if owned < 64 or stages * looped * d * 4 > 160_000 or (looped == 128 and stages > 3):
            continue
        for warps in warps_of[queries * keys]:
            registers = [None, 168] if (queries, keys, warps) == (64, 64, 4) and d <= 64 else [None]
            space += [Tiles(queries, keys, warps, stages, limit) for limit in registers]
    return space


def launcher(
    kernel: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, do: torch.Tensor
) -> tuple[Callable[[Tiles], None], list[torch.Tensor]]:
    """Return a function that runs the kernel, causal, with given tiles, and the tensors that it writes."""
    scale = q.shape[-1] ** -0.5
    o, log_sum_exp = ops.flash_forward(q, k, v, True)
    if kernel == "forward":
        return lambda tiles: ops.launch_forward(tiles, q, k, v, o, log_sum_exp, True, scale), [o, log_sum_exp]
    delta, log2_l = ops.launch_delta(o, do, log_sum_exp)
    if kernel == "dkdv":
        dk, dv = torch.empty_like(k), torch.empty_like(v)
        return lambda t: ops.launch_dkdv(t, q, k, v, do, log2_l, delta, dk, dv, True, scale), [dk, dv]
    dq = torch.empty_like(q)
    return lambda tiles: ops.launch_dq(tiles, q, k, v, do, log2_l, delta, dq, True, scale), [dq]


def relative_error(x: torch.Tensor, reference: torch.Tensor) -> float:
    """Compute ‖x - reference‖ / ‖reference‖ in float64."""
    x, reference = x.double(), reference.double()
    return ((x - reference).norm() / reference.norm()).item()


def search(kernel: str, d: int, heads: int, sequence: int, dtype: torch.dtype, rep_ms: int) -> list[dict]:
    """Time every candidate of a kernel; return the rows, the fastest first."""
    run, written = launcher(kernel, *(torch.randn(1, heads, sequence, d, device="cuda", dtype=dtype) for _ in range(4)))
    flops = MATMULS[kernel] * 2 * heads * sequence**2 / 2 * d
    rows, first = [], None
    for tiles in candidates(kernel, d, dtype):
        row = {"kernel": kernel, "d": d, "queries": tiles.block_m, "keys": tiles.block_n, "warps": tiles.warps,
               "stages": tiles.stages, "registers": tiles.registers}  # fmt: skip
        for tensor in written:
            tensor.fill_(torch.nan)
        try:
            run(tiles)
        except OutOfResources as error:
            rows.append({**row, "status": str(error).split(".")[0]})
            continue
        first = first or [tensor.clone() for tensor in written]
        difference = max(relative_error(tensor, other) for tensor, other in zip(written, first))
        assert difference < (1e-5 if dtype == torch.float32 else 0.01), (tiles, difference)
        ms = median_ms(partial(run, tiles), torch.device("cuda"), rep_ms=rep_ms)
        rows.append({**row, "ms": ms, "TFLOP/s": flops / ms / 1e9})
    return sorted(rows, key=lambda row: row.get("ms", float("inf")))


@dataclass(frozen=True)
class Options(Measurement):
    """Search for the fastest tiles of each FlashAttention kernel. Needs an NVIDIA GPU."""

    dims: tuple[int, ...] = (16, 32, 64, 128)
    """Widths of a head."""
    kernels: tuple[Literal["forward", "dkdv", "dq"], ...] = ("forward", "dkdv", "dq")
    """Kernels to search for."""
    dtype: Precision = "bfloat16"
    """Precision of the inputs."""
    heads: int = 16
    """Heads."""
    sequence: int | None = None
    """Sequence length. Default: 16 384 in bfloat16, 4096 in float32."""
    rep_ms: int = 60
    """How long each median is measured, in ms."""
    name: str = "flash_tiles"


def main(options: Options) -> None:
    """Measure, print a table per kernel and write a file."""
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    sequence = options.sequence or (4096 if dtype == torch.float32 else 16_384)
    what = f"tiles of the FlashAttention kernels, {options.heads} x {sequence}, causal, {options.dtype}"
    file = ResultFile(options.out, options.name, what, torch.device("cuda"))
    rows = []
    for d, kernel in product(options.dims, options.kernels):
        found = search(kernel, d, options.heads, sequence, dtype, options.rep_ms)
        print_table(f"{kernel}, d {d}", found[:8])
        rows += found
        file.write(rows)
    file.announce()


if __name__ == "__main__":
    main(tyro.cli(Options))
