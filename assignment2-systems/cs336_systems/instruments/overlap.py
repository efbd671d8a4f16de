"""How much communication is hidden behind computation: intervals from a profiler's trace, numbers, and a picture.

A step consists of three sets of intervals on one clock: its phases, the work that computes, and the messages. On a GPU
these are kernels, and NCCL's kernels are the messages. A kernel runs after the host has launched it, so a phase reaches
from the first to the last kernel that was launched in it. On a CPU they are the work of the host and of gloo's threads.
A message includes the time in which it waits for the other ranks to send theirs.
"""

import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cs336_systems.instruments.measure import Row
from cs336_systems.instruments.trace import record, work_in
from cs336_systems.training.step import PHASES

#: Start and end of an interval.
Interval = tuple[float, float]
#: Kernels of NCCL, and the ranges that gloo's threads record.
_NCCL, _GLOO = re.compile(r"^nccl", re.IGNORECASE), "gloo:"
#: Steps that the profiler sees; it warms up in all but the last.
TRACED_STEPS = 2


@dataclass(frozen=True)
class StepTimeline:
    """Intervals of one step on one rank, in ms since the step's first event; each list is ordered and disjoint."""

    phases: dict[str, Interval]
    """A phase of `PHASES` -> its interval."""
    compute: list[Interval]
    """Kernels, or on a CPU operators, that compute."""
    communication: list[Interval]
    """Messages in progress."""


def merged(intervals: Iterable[Interval]) -> list[Interval]:
    """Return the union of intervals as ordered, disjoint intervals."""
    union: list[Interval] = []
    for start, end in sorted(intervals):
        if union and start <= union[-1][1]:
            union[-1] = union[-1][0], max(end, union[-1][1])
        else:
            union.append((start, end))
    return union


def length(intervals: Iterable[Interval]) -> float:
    """Return the total length of disjoint intervals."""
    return sum(end - start for start, end in intervals)


def common(a: list[Interval], b: list[Interval]) -> list[Interval]:
    """Return the intersection of two lists of ordered, disjoint intervals."""
    both, i, j = [], 0, 0
    while i < len(a) and j < len(b):
        start, end = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if start < end:
            both.append((start, end))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return both


def overlap_row(timeline: StepTimeline) -> Row:
    """Return the milliseconds of communication, and its shares in the backward pass and hidden by computation."""
    messages = timeline.communication
    whole = length(messages)
    backward = [timeline.phases["backward"]] if "backward" in timeline.phases else []

    def share(of: list[Interval]) -> float | None:
        return 100 * length(common(messages, of)) / whole if whole else None

    return {
        "compute_ms": length(timeline.compute),
        "communication_ms": whole,
        "in_backward_%": share(backward),
        "hidden_%": share(timeline.compute),
    }


def step_timeline(trace: dict[str, Any]) -> StepTimeline:
    """Extract the intervals of a Chrome trace of one step."""
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    on_gpu = any(event.get("cat") == "kernel" for event in events)
    phases, compute, communication = _of_kernels(trace) if on_gpu else _of_operators(events)
    starts = [start for start, _ in (*phases.values(), *compute, *communication)]
    first = min(starts, default=0.0)

    def ms(interval: Interval) -> Interval:
        return (interval[0] - first) / 1e3, (interval[1] - first) / 1e3

    return StepTimeline(
        {name: ms(interval) for name, interval in phases.items()},
        [ms(interval) for interval in merged(compute)],
        [ms(interval) for interval in merged(communication)],
    )


_Found = tuple[dict[str, Interval], list[Interval], list[Interval]]


def _of_kernels(trace: dict[str, Any]) -> _Found:
    compute: list[Interval] = []
    communication: list[Interval] = []
    phases: dict[str, Interval] = {}
    for work in work_in(trace):
        interval = work.start, work.start + work.duration
        if _NCCL.match(work.name):
            communication.append(interval)
            continue
        compute.append(interval)
        if work.phase in PHASES:
            start, end = phases.get(work.phase, interval)
            phases[work.phase] = min(start, interval[0]), max(end, interval[1])
    return {name: phases[name] for name in PHASES if name in phases}, compute, communication


def _of_operators(events: list[dict[str, Any]]) -> _Found:
    def found(kind: str, prefix: str) -> list[Interval]:
        chosen = [event for event in events if event.get("cat") == kind and event["name"].startswith(prefix)]
        return [(event["ts"], event["ts"] + event["dur"]) for event in chosen]

    ranges = {event["name"]: event for event in events if event.get("cat") == "user_annotation"}
    phases = {name: (ranges[name]["ts"], ranges[name]["ts"] + ranges[name]["dur"]) for name in PHASES if name in ranges}
    return phases, found("cpu_op", "aten::"), found("user_annotation", _GLOO)


def record_step(run: Callable[[], object], device: torch.device, keep: Path | None = None) -> dict[str, Any]:
    """Return the Chrome trace of the last of `TRACED_STEPS` calls of `run`.

    Args:
        run: one training step.
        device: the device it runs on.
        keep: also leave the trace in this file (.json.gz).
    """
    with tempfile.TemporaryDirectory() as folder:
        return record(run, device, TRACED_STEPS - 1, keep or Path(folder) / "trace.json.gz")


# A scale that color-blind readers can tell apart (Okabe & Ito 2008).
_PHASE_COLORS = {"forward": "#0072b2", "loss": "#56b4e9", "backward": "#e69f00", "optimizer": "#009e73"}
_LANES = {"phases": None, "compute": "#666666", "messages": "#d55e00"}


def plot_timelines(timelines: Mapping[str, StepTimeline], path: Path, title: str = "") -> None:
    """Draw steps below each other as PNG, each with a lane for its phases, one for compute and one for messages."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(9, 1.1 + 0.62 * len(timelines)), layout="constrained")
    axes = figure.subplots()
    height, gap = 0.8, 0.6  # height of a lane, and gap between steps
    places = []
    last = 0.0
    for number, timeline in enumerate(timelines.values()):
        top = number * (len(_LANES) + gap)
        places.append(top + (len(_LANES) - 1) / 2)
        for name, (start, end) in timeline.phases.items():
            axes.broken_barh([(start, end - start)], (top - height / 2, height), color=_PHASE_COLORS[name], linewidth=0)
        for lane, (name, intervals) in enumerate(
            (("compute", timeline.compute), ("messages", timeline.communication)), start=1
        ):
            bars = [(start, end - start) for start, end in intervals]
            axes.broken_barh(bars, (top + lane - height / 2, height), color=_LANES[name], linewidth=0)
        ends = [end for _, end in (*timeline.phases.values(), *timeline.compute, *timeline.communication)]
        last = max([last, *ends])
    axes.set(xlabel="time (ms)", title=title, xlim=(0, 1.01 * last or 1))
    axes.set_yticks(places, list(timelines))
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    colors = _PHASE_COLORS | {name: color for name, color in _LANES.items() if color}
    handles = [Patch(color=color, label=name) for name, color in colors.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
