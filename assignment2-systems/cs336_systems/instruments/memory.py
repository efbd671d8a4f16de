"""Measure how much memory a step takes, and what takes it: the course's memory_profiling."""

import ast
import itertools
import re
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cs336_basics.strategy import resolve_device
from cs336_systems.instruments.measure import Row, peak_bytes, print_table, result_file, run_grid
from cs336_systems.instruments.options.one_gpu import Memory
from cs336_systems.instruments.step import step_cases, step_of_case
from cs336_systems.theory.units import FLOAT32, GB, MIB
from cs336_systems.training.choices import Pass
from cs336_systems.training.step import StepConfig, TrainingStep

#: The CUDA allocator hands out multiples of this many bytes.
GRANULE = 512
BASE = "allocated before"
REST = "everything else"
BACKWARD = "backward pass"
_THIS_REPOSITORY = re.compile(r"/cs336_(basics|systems)/(\w+/)*\w+\.py$")


def run(options: Memory) -> None:
    """Measure, print a table and write a file, and with --snapshot pictures."""
    device = resolve_device(options.device)
    if device.type != "cuda":
        raise ValueError(
            f"memory is read from the CUDA allocator, but the device is {device}; run this on an NVIDIA GPU"
        )
    cases = step_cases(options, device, **{"pass": options.passes})
    file = result_file(options, "peak memory of a training step", device, batch_size=options.batch_size)

    def measure(case: Row) -> Row:
        stem = options.out / "_".join([options.name, *map(str, case.values())]) if options.snapshot else None
        return measure_memory(step_of_case(options, case, device), case["pass"], stem)

    rows = run_grid(cases, measure, file)
    common = {"batch_size": options.batch_size}
    print_table("peak memory of a training step", rows, settings=list(cases[0]), common=common)
    file.announce()


def measure_memory(config: StepConfig, which: Pass, snapshot: Path | None = None) -> Row:
    """Measure the memory before a step and at its peak, in the second step, when the optimizer has its state.

    Args:
        config: the parts of the step, on a CUDA device.
        which: the pass.
        snapshot: record one more step and write <snapshot>.pickle and <snapshot>.png.

    Returns:
        GB of tensors before the step and at the peak, MiB of one tensor of the residual stream in float32, and with a
        snapshot the "largest" allocations.
    """
    torch._C._cuda_clearCublasWorkspaces()  # left by an earlier row; they count as tensors
    step = TrainingStep(config)
    step.run(which)
    before = torch.cuda.memory_allocated(config.device)
    peak = peak_bytes(lambda: step.run(which), config.device)
    row: Row = {
        "before_GB": before / GB,
        "peak_GB": peak / GB,
        "residual_MiB": config.tokens * config.model.d_model * FLOAT32 / MIB,
    }
    if snapshot is not None:
        recorded = record_snapshot(step, which, snapshot.with_name(snapshot.name + ".pickle"))
        model = config.model
        title = f"{which}: {model.num_layers} blocks of width {model.d_model}, {config.precision}, "
        title += f"{config.batch_size} x {model.context_length} tokens"
        plot_timeline(recorded, snapshot.with_name(snapshot.name + ".png"), title)
        row["largest"] = largest_allocations(recorded)
    return row


def record_snapshot(step: TrainingStep, which: Pass, path: Path) -> dict[str, Any]:
    """Record every allocation of one pass with its Python stack; write it to `path` and return it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.cuda.memory._record_memory_history(context="alloc", stacks="python", max_entries=1_000_000)
    try:
        step.run(which)
        torch.cuda.synchronize(step.config.device)
        torch.cuda.memory._dump_snapshot(str(path))
        return torch.cuda.memory._snapshot(step.config.device)
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)


@dataclass(frozen=True)
class Timeline:
    """Active memory after each event that changed it."""

    times_ms: np.ndarray
    """[events] milliseconds since the first event, by the host's clock."""
    groups: dict[str, np.ndarray]
    """The allocating function -> [events] active bytes. `BASE` comes first: the memory allocated before."""

    @property
    def total(self) -> np.ndarray:
        """[events] active bytes."""
        return np.sum(list(self.groups.values()), axis=0)


def timeline(snapshot: dict[str, Any], top: int = 8) -> Timeline:
    """Add up the allocations and frees of a snapshot of the CUDA allocator.

    A snapshot's trace records only changes. The memory allocated before it began is found from the other end: the
    blocks that are active when the snapshot is taken, minus all changes. This also works for a trace that has lost its
    beginning because the recorder was full.

    Args:
        snapshot: the result of `torch.cuda.memory._snapshot`, for one device.
        top: number of groups to distinguish, those that hold most at some time; the others become `REST`.
    """
    events = [event for events in snapshot["device_traces"] for event in events]
    events = [event for event in events if event["action"] in ("alloc", "free_completed")]
    alive: dict[int, tuple[str, int]] = {}
    changes = []  # time, group and bytes of each event
    for event in events:
        if event["action"] == "alloc":
            alive[event["addr"]] = allocated_by(event.get("frames", [])), _rounded(event["size"])
            changes.append((event["time_us"], *alive[event["addr"]]))
        else:
            group, size = alive.pop(event["addr"], (BASE, _rounded(event["size"])))
            changes.append((event["time_us"], group, -size))

    at_end = sum(segment["active_size"] for segment in snapshot["segments"])
    base = at_end - sum(size for _, _, size in changes)
    names = [BASE, *sorted({group for _, group, _ in changes} - {BASE})]
    steps = np.zeros((len(names), len(changes) + 1))
    steps[0, 0] = base
    for index, (_, group, size) in enumerate(changes, start=1):
        steps[names.index(group), index] = size
    active = steps.cumsum(axis=1)

    most = active.max(axis=1)
    largest = sorted(range(1, len(names)), key=lambda index: -most[index])
    groups = {BASE: active[0]} | {names[index]: active[index] for index in largest[:top]}
    if largest[top:]:
        groups[REST] = active[largest[top:]].sum(axis=0)
    moments = np.array([changes[0][0] if changes else 0, *(moment for moment, _, _ in changes)])
    return Timeline((moments - moments[0]) / 1e3, groups)


def plot_timeline(snapshot: dict[str, Any], path: Path, title: str = "") -> Timeline:
    """Draw active memory over time as PNG, stacked by the function that allocated it; see `timeline`."""
    from matplotlib.figure import Figure

    drawn = timeline(snapshot)
    total = drawn.total
    kept = _thinned(total, 4000)
    # Gray for memory that is always allocated, then a scale that color-blind readers can tell apart (Okabe & Ito 2008).
    colors = ["#c8c8c8", "#0072b2", "#e69f00", "#009e73", "#d55e00", "#56b4e9", "#cc79a7", "#f0e442", "#7f4f24"]
    shades = dict(zip(drawn.groups, colors)) | {REST: "#666666"}

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.stackplot(
        drawn.times_ms[kept],
        [active[kept] / GB for active in drawn.groups.values()],
        labels=list(drawn.groups),
        colors=[shades[name] for name in drawn.groups],
        step="post",
        linewidth=0,
    )
    peak = int(total.argmax())
    axes.plot(drawn.times_ms[kept], total[kept] / GB, color="black", linewidth=0.6, drawstyle="steps-post")
    axes.plot(drawn.times_ms[peak], total[peak] / GB, "v", color="black", markersize=6)
    where = drawn.times_ms[peak] / max(drawn.times_ms[-1], 1e-9)
    axes.annotate(
        f"peak {total[peak] / GB:.3g} GB",
        (drawn.times_ms[peak], total[peak] / GB),
        xytext=(0, 7),
        textcoords="offset points",
        ha="left" if where < 0.1 else "right" if where > 0.9 else "center",
    )
    axes.set(
        xlabel="time on the host (ms)", ylabel="active memory (GB)", title=title, ylim=(0, 1.12 * total[peak] / GB)
    )
    axes.margins(x=0)
    axes.grid(alpha=0.3)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right upper", frameon=False)  # in the order of the stack
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return drawn


def largest_allocations(snapshot: dict[str, Any], count: int = 10) -> list[Row]:
    """List the largest allocations: their size, how often they occurred, and the functions that made them."""
    seen: dict[tuple[int, str], int] = defaultdict(int)
    for events in snapshot["device_traces"]:
        for event in events:
            if event["action"] == "alloc":
                seen[event["size"], allocated_by(event.get("frames", []))] += 1
    return [
        {"MiB": size / MIB, "times": times, "allocated_by": group}
        for (size, group), times in sorted(seen.items(), reverse=True)[:count]
    ]


def allocated_by(frames: list[dict[str, Any]]) -> str:
    """Name the innermost function of this repository in a stack, whose innermost frame comes first.

    A linear map is named by its caller, since there are many of them. Autograd's own threads have no Python frames, so
    a stack without any is the backward pass.
    """
    ours = [frame for frame in frames if _THIS_REPOSITORY.search(frame["filename"])]
    for frame in ours:
        name = _qualified_name(frame["filename"], frame["line"]) or frame["name"]
        if not name.startswith("Linear."):
            return name.removesuffix(".forward").removesuffix(".<lambda>")
    return frames[0]["name"] if frames else BACKWARD


def _rounded(size: int) -> int:
    return -(-size // GRANULE) * GRANULE


def _thinned(total: np.ndarray, bins: int) -> np.ndarray:
    """Return the indices of the lowest and highest event of every bin, so that a drawing of many events keeps peaks."""
    if len(total) <= 2 * bins:
        return np.arange(len(total))
    edges = np.linspace(0, len(total), bins + 1).astype(int)
    chosen = [start + extreme(total[start:end]) for start, end in itertools.pairwise(edges) for extreme in _EXTREMES]
    return np.unique([0, *chosen, len(total) - 1])


_EXTREMES = (np.argmin, np.argmax)


def _qualified_name(filename: str, line: int) -> str | None:
    """Return class and function of a line, as in "SwiGLU.forward"; None if the file cannot be read."""
    inside = [(start, name) for start, end, name in _functions(filename) if start <= line <= end]
    return max(inside)[1] if inside else None


@cache
def _functions(filename: str) -> list[tuple[int, int, str]]:
    """Return the first line, last line and qualified name of every function in a file."""
    try:
        tree = ast.parse(Path(filename).read_text(encoding="utf-8"))
    except (OSError, SyntaxError):
        return []
    found = []

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            name = prefix
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                name = f"{prefix}{child.name}"
                if isinstance(child, ast.FunctionDef):
                    found.append((child.lineno, child.end_lineno or child.lineno, name))
                name += "."
            visit(child, name)

    visit(tree, "")
    return found
