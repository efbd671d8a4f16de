"""Draw the figures of the write-up from `results/`: `python -m writeup.figures` in the package's folder."""

import json
import math
from collections.abc import Callable
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from matplotlib.figure import Figure

from cs336_basics.plots import panels, save_figures
from cs336_systems.instruments.measure import OK
from cs336_systems.theory.activations import attention_traffic_bytes
from cs336_systems.theory.collectives import ddp_overhead
from cs336_systems.theory.units import MIB

RESULTS = Path(__file__).parent.parent / "results"
#: Names of attentions in legends.
NAMES = {
    "flash": "ours", "plain": "plain", "sdpa-flash": "PyTorch, FlashAttention-2", "sdpa-cudnn": "PyTorch, cuDNN",
    "sdpa-efficient": "PyTorch, memory-efficient", "flex": "FlexAttention",
}  # fmt: skip


def all_reduce(results: Path) -> Figure:
    """Draw bandwidth against message size."""
    figure, (axes,) = panels(1)
    for name in ("bench_allreduce_nccl", "bench_allreduce"):
        rows = _read(results, name)["rows"]
        for backend, processes in dict.fromkeys((row["backend"], row["processes"]) for row in rows):
            line = [row for row in rows if (row["backend"], row["processes"]) == (backend, processes)]
            axes.loglog(
                [row["size_MB"] for row in line], [row["bus_GB/s"] for row in line], marker="o", markersize=3.5,
                label=f"{'NCCL' if backend == 'nccl' else backend}, {processes} ranks",
            )  # fmt: skip
    axes.set(xlabel="message (MB)", ylabel="bus bandwidth (GB/s)")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def buckets(results: Path) -> Figure:
    """Draw the overhead of DDP against the bucket size: measured, fitted, and by the course's formula."""
    figure, (axes,) = panels(1)
    fit = _read(results, "bucket_fit")
    sizes = [_mib(row, "bucket") for row in fit["rows"]]
    axes.semilogx(sizes, [row["measured_ms"] for row in fit["rows"]], "o", label="measured")
    axes.semilogx(sizes, [row["predicted_ms"] for row in fit["rows"]], "x-", label="fitted")
    finer = np.geomspace(sizes[0], sizes[-1], 60)
    total, bandwidth = fit["total_bytes"], fit["bytes_per_second"]
    course = [1e3 * ddp_overhead(total, bandwidth, fit["call_ms"] / 1e3, total / (size * MIB)) for size in finer]
    axes.semilogx(finer, course, "--", label="the course's formula, same o")
    axes.axvline(_mib(fit, "optimum"), color="#999999", linewidth=0.7, linestyle=":")
    axes.set(xlabel="bucket (MiB)", ylabel="beyond no communication (ms)", ylim=(0, 75))
    axes.legend()
    return figure


def flash(results: Path) -> Figure:
    """Draw the speed of forward and backward pass against the sequence length."""
    rows = [row for row in _read(results, "bench_flash")["rows"] if row["dtype"] == "bfloat16"]
    dims = sorted({row["dim"] for row in rows})
    of_dims = {f"d = {dim}": [row for row in rows if row["dim"] == dim] for dim in dims}
    return _against_length(of_dims, "both_TFLOP/s", "TFLOP/s")


def flash_grid(results: Path) -> Figure:
    """Draw the time of forward and backward pass of one head against the length, for each width and dtype."""
    of_panels = {}
    for name in ("bench_flash_grid", "bench_flash_grid_fp32"):
        rows = _read(results, name)["rows"]
        for dtype, dim in dict.fromkeys((row["dtype"], row["dim"]) for row in rows):
            of_panels[f"{dtype}, d = {dim}"] = [row for row in rows if (row["dtype"], row["dim"]) == (dtype, dim)]
    return _against_length(of_panels, "both_ms", "ms", panel_rows=2)


def _against_length(of_panels: dict[str, list[dict[str, Any]]], key: str, unit: str, panel_rows: int = 1) -> Figure:
    """Draw a line for each attention, in a panel for each title."""
    figure, axes_of = panels(len(of_panels) // panel_rows, 2.6 if panel_rows == 1 else 4.2, panel_rows)
    for axes, (title, rows) in zip(axes_of, of_panels.items(), strict=True):
        for attention, label in NAMES.items():
            line = [row for row in rows if (row["attention"], row["status"]) == (attention, OK)]
            # A kernel that was not measured draws nothing, and keeps its color.
            lengths, values = [row["seq"] for row in line], [row[key] for row in line]
            axes.loglog(lengths, values, marker="o", markersize=3, label=label if line else None)
        axes.set(xlabel="sequence length", ylabel=unit, title=title)
        if panel_rows > 1:  # they share scales
            axes.label_outer()
    handles = {label: handle for axes in axes_of for handle, label in zip(*axes.get_legend_handles_labels())}
    # At most five names per row: more are wider than the page.
    columns = math.ceil(len(handles) / math.ceil(len(handles) / 5))
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=columns)
    return figure


def steps(results: Path) -> Figure:
    """Draw the time of forward and backward pass of every model against its FLOPs, with a panel for each dtype.

    The panel for bfloat16 also shows the time of a matmul with the same FLOPs.
    """
    figure, both = panels(2, 2.8)
    for axes, (dtype, name) in zip(both, {"bfloat16": "bench_step_bf16", "float32": "bench_step_fp32"}.items()):
        rows = [
            row for row in _read(results, name)["rows"] if row["status"] == OK and row["pass"] == "forward-backward"
        ]
        for index, size in enumerate(dict.fromkeys(row["size"] for row in rows)):
            for mode, style in (("eager", "--"), ("compiled-blocks", "-")):
                line = [row for row in rows if (row["size"], row["mode"]) == (size, mode)]
                flops = [row["TFLOP/s"] * row["median_ms"] / 1e3 for row in line]
                axes.loglog(
                    flops, [row["median_ms"] for row in line], style, color=f"C{index}", marker="o", markersize=3,
                    label=size if mode == "compiled-blocks" else None,
                )  # fmt: skip
        axes.set(xlabel="TFLOP", title=dtype, ylim=(15, 2300))
        axes.set_yticks([20, 50, 100, 200, 500, 1000, 2000], ["20", "50", "100", "200", "500", "1000", "2000"])
    ceiling = _read(results, "leaderboard_2025_h100")["ceilings"]["matmul_TFLOP/s"]
    limits = both[0].get_xlim()
    both[0].plot(limits, [1e3 * flops / ceiling for flops in limits], color="black", linewidth=1, label="a matmul")
    both[0].set(xlim=limits, ylabel="ms")
    figure.legend(*both[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    return figure


def roofline(results: Path) -> Figure:
    """Draw what the kernels reach at the 2025 leaderboard's shape, under the ceilings of the same run."""
    figure, (axes,) = panels(1)
    result = _read(results, "leaderboard_2025_h100")
    flops_ceiling = result["ceilings"]["matmul_TFLOP/s"]
    bandwidth = result["ceilings"]["copy_GB/s"] / 1e3  # TB/s
    ridge = flops_ceiling / bandwidth
    intensities = np.geomspace(10, 30_000, 50)
    axes.loglog(intensities, np.minimum(flops_ceiling, bandwidth * intensities), color="black", linewidth=1)
    axes.axvline(ridge, color="#999999", linewidth=0.7, linestyle=":")
    for row, marker in zip(result["rows"], cycle("osd^v")):
        if row["status"] == OK:
            flops = row["TFLOP/s"] * row["ms"] * 1e9
            label = NAMES[row["attention"]]
            axes.plot(
                [flops / attention_traffic_bytes()], [row["TFLOP/s"]], marker, markerfacecolor="none", label=label
            )
    axes.set(xlabel="FLOP per byte that must be moved", ylabel="TFLOP/s", ylim=(5, 1000))
    axes.set_yticks([10, 30, 100, 300, 1000], ["10", "30", "100", "300", "1000"])
    axes.minorticks_off()
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _read(results: Path, name: str) -> dict[str, Any]:
    """Read a file of results by its base name, in whichever folder it is."""
    return json.loads(next(results.rglob(f"{name}.json")).read_text(encoding="utf-8"))


def _mib(row: dict[str, Any], name: str) -> float:
    """Return a size in MiB, which older files of results call MB."""
    return row[f"{name}_MiB"] if f"{name}_MiB" in row else row[f"{name}_MB"]


FIGURES: dict[str, Callable[[Path], Figure]] = {
    draw.__name__: draw for draw in (all_reduce, buckets, flash, flash_grid, steps, roofline)
}


def main(out: Path = Path("writeup/figures"), results: Path = RESULTS) -> None:
    """Draw the figures of the write-up.

    Args:
        out: folder of the SVG files.
        results: folder of the results.
    """
    save_figures({name: partial(draw, results) for name, draw in FIGURES.items()}, out)


if __name__ == "__main__":
    tyro.cli(main)
