"""Search for the tiles of each FlashAttention kernel: `TILES` of `triton_ops` come from here.

    python -m benchmarks.flash_tiles [--dtype {bf16,fp32}] [--dims 64 128] [--kernels forward dkdv dq] [--out results]

Causal, 16 heads, 16 384 tokens in bfloat16, 4096 in float32. Every candidate's result is compared with the first's.
"""

import argparse
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

import torch
from triton.runtime.errors import OutOfResources

from cs336_systems.flash_attention import triton_ops as ops
from cs336_systems.flash_attention.triton_ops import Tiles
from cs336_systems.measure import ResultFile, median_ms, show

#: Products of [queries keys d] per kernel.
PRODUCTS = {"forward": 2, "dkdv": 4, "dq": 3}


def candidates(kernel: str, d: int, dtype: torch.dtype) -> list[Tiles]:
    """A space small enough to search in minutes, without what cannot fit into registers or shared memory."""
    if dtype == torch.float32:
        # Eight warps for large tiles only: at d = 128 some small one ended in an illegal memory access (Triton 3.6).
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
    """A function that runs the kernel, causal, with given tiles, and the tensors that it writes."""
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
    """‖x - reference‖ / ‖reference‖, computed in float64."""
    x, reference = x.double(), reference.double()
    return ((x - reference).norm() / reference.norm()).item()


def search(kernel: str, d: int, heads: int, sequence: int, dtype: torch.dtype, rep_ms: int) -> list[dict]:
    run, written = launcher(kernel, *(torch.randn(1, heads, sequence, d, device="cuda", dtype=dtype) for _ in range(4)))
    flops = PRODUCTS[kernel] * 2 * heads * sequence**2 / 2 * d
    rows, first = [], None
    for tiles in candidates(kernel, d, dtype):
        row = {"kernel": kernel, "d": d, "queries": tiles.queries, "keys": tiles.keys, "warps": tiles.warps,
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--kernels", nargs="+", choices=sorted(PRODUCTS), default=list(PRODUCTS))
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--sequence", type=int)
    parser.add_argument("--rep-ms", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("results"))
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.dtype == "fp32":
        dtype, sequence, name = torch.float32, arguments.sequence or 4096, "flash_tiles_fp32"
    else:
        dtype, sequence, name = torch.bfloat16, arguments.sequence or 16384, "flash_tiles"
    what = f"tiles of the FlashAttention kernels, {arguments.heads} x {sequence}, causal, {arguments.dtype}"
    file = ResultFile(arguments.out, name, what, torch.device("cuda"))
    rows = []
    for d, kernel in product(arguments.dims, arguments.kernels):
        found = search(kernel, d, arguments.heads, sequence, dtype, arguments.rep_ms)
        show(f"{kernel}, d {d}", found[:8])
        rows += found
        file.write(rows)
    file.announce()


if __name__ == "__main__":
    main()
