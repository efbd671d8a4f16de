"""Record and read the profiler's traces: which kernel ran when, for which phase of a step, and for how long.

Meta's HolisticTraceAnalysis also breaks GPU traces down; this module reads traces of a CPU as well, and makes the
tables that the course asks for.
"""

import bisect
import gzip
import json
import math
import os
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from cs336_systems.instruments.measure import Row, synchronize
from cs336_systems.training.step import PHASES

#: Ranges inside attention: three for plain attention, a single one for a fused kernel.
PARTS = ("scores", "softmax", "output", "attention")

#: Patterns that tell the kind of work of a kernel (or, on a CPU, of an operator) from its name. The first match counts.
CATEGORIES: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (name, re.compile(pattern, re.IGNORECASE))
    for name, pattern in (
        ("matmuls", r"^triton_tem_"),  # the prefix of an Inductor kernel says what it has fused
        ("reductions", r"^triton_(red|per)_"),
        ("elementwise", r"^triton_poi_"),
        ("fused attention", r"flash|fmha|sdpa|attention"),
        ("matmuls", r"gemm|gemv|nvjet|cutlass|xmma|splitk|^aten::(mm|bmm|addmm|baddbmm|mv|dot)$"),
        ("multi-tensor", r"multi_tensor_apply|foreach|adam"),
        ("indexing", r"gather|scatter|embedding|radixsort|(?<!with_)index"),
        ("copies and fills", r"memcpy|memset|copy|catarray|(?<!masked_)fill|^aten::(clone|cat|zero_)$"),
        ("reductions", r"reduce|softmax|cross_entropy|^aten::(sum|mean|amax|max|norm)$"),
        (
            "elementwise",
            r"elementwise|triu_tril|^aten::((mul|add|sub|div|exp|log|pow|neg|sqrt|rsqrt|square|sigmoid|where)_?"
            r"|lerp_|addcmul_|addcdiv_|sigmoid_backward|masked_fill_?|bitwise_not|tril)$",
        ),
    )
)


def record(run: Callable[[], object], device: torch.device, steps: int, path: Path) -> dict[str, Any]:
    """Profile calls of `run`, write the Chrome trace, and return it.

    Args:
        run: one training step.
        device: the device it runs on.
        steps: calls to profile, after one in which the profiler itself warms up.
        path: file of the trace (.json.gz).
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise the profiler reports on itself
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.profiler.profile(
        activities=activities,
        schedule=torch.profiler.schedule(wait=0, warmup=1, active=steps, repeat=1),
        on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(path)),
    ) as profiler:
        for _ in range(1 + steps):
            run()
            synchronize(device)
            profiler.step()
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return json.load(file)


@dataclass(frozen=True)
class Work:
    """A kernel (on a CPU: an operator without those that it calls) and the ranges it was launched in."""

    name: str
    start: float
    """Time at which it began, in µs."""
    duration: float
    """Time for which it ran, in µs."""
    phase: str
    """One of `PHASES`, or "other"."""
    part: str
    """One of `PARTS`, or empty."""
    occurrence: int
    """Index of this range within its phase."""


def work_in(trace: dict[str, Any]) -> list[Work]:
    """Return all kernels of a Chrome trace, or its operators if there are no kernels.

    A kernel runs after the host has launched it, possibly long after the host has left the range. So the time of the
    launch decides the range. The backward pass launches kernels from a thread of its own, but while the range is open.
    """
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    ranges: dict[str, list[tuple[float, float]]] = {
        name: sorted(
            (event["ts"], event["ts"] + event["dur"])
            for event in events
            if event.get("cat") == "user_annotation" and event["name"] == name
        )
        for name in (*PHASES, *PARTS)
    }

    def at(names: tuple[str, ...], moment: float) -> tuple[str, int]:
        for name in names:
            index = bisect.bisect_right(ranges[name], (moment, math.inf)) - 1
            if index >= 0 and moment <= ranges[name][index][1]:
                return name, index
        return "", 0

    kernels = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    if kernels:
        launches = {
            event["args"]["correlation"]: event["ts"]
            for event in events
            if event.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in event.get("args", {})
        }
        timed = [(event, event["dur"], launches.get(event["args"].get("correlation"), -math.inf)) for event in kernels]
    else:
        timed = [(event, own, event["ts"]) for event, own in _own_times(events)]

    work = []
    for event, duration, launched in timed:
        name, occurrence = at(PHASES, launched)
        part, _ = at(PARTS, launched)
        work.append(Work(event["name"], event["ts"], duration, name or "other", part, occurrence))
    return work


def _own_times(events: list[dict[str, Any]]) -> list[tuple[dict[str, Any], float]]:
    """Return operators with the time that they spent outside the operators they called, in µs."""
    operators = sorted(
        (event for event in events if event.get("cat") == "cpu_op"),
        key=lambda event: (event["tid"], event["ts"], -event["dur"]),
    )
    own = [event["dur"] for event in operators]
    callers: list[int] = []
    for index, event in enumerate(operators):
        while callers and (
            operators[callers[-1]]["tid"] != event["tid"]
            or operators[callers[-1]]["ts"] + operators[callers[-1]]["dur"] <= event["ts"]
        ):
            callers.pop()
        if callers:
            own[callers[-1]] -= event["dur"]
        callers.append(index)
    return list(zip(operators, own))


def category(name: str) -> str:
    """Return the kind of work that a kernel or operator with this name does."""
    return next((kind for kind, pattern in CATEGORIES if pattern.search(name)), "other")


def short_name(name: str, length: int = 36) -> str:
    """Shorten a kernel's name: drop namespaces, and of PyTorch's own kernels keep only the distinguishing part."""
    name = re.sub(r"\(anonymous namespace\)::|at::native::|at::cuda::|c10::|std::|^void ", "", name)
    if inner := re.search(r"(\w*elementwise_kernel|reduce_kernel|multi_tensor_apply_kernel)\w*<", name):
        told = re.search(r"\w+_kernel_cuda|\w*kernel_impl|\w+(?:_f|F)unctor\b|\w+Ops\b", name[inner.end() :])
        if told:
            name = f"{inner[1].removesuffix('_kernel')}: {told[0]}"
    return name if len(name) <= length else name[: length - 1] + "…"


def range_rows(work: list[Work], steps: int, flops: dict[str, float] | None = None) -> list[Row]:
    """Make one row per range: time and number of its kernels, time from the first to the last, and share of matmuls."""
    total = sum(one.duration for one in work)
    inside = [(name, [one for one in work if one.phase == name]) for name in (*PHASES, "other")]
    inside[1:1] = [(f"  {part}", [one for one in work if one.part == part]) for part in PARTS]  # below "forward"

    rows = []
    for name, chosen in (*inside, ("step", work)):
        if not chosen:
            continue
        busy = sum(one.duration for one in chosen)
        row: Row = {
            "range": name,
            "busy_ms": busy / steps / 1e3,
            "span_ms": _span(chosen) / steps / 1e3 if name in PHASES else None,
            "share_%": _percent(busy, total),
            "calls": round(len(chosen) / steps),
            "matmul_%": _percent(sum(one.duration for one in chosen if category(one.name) == "matmuls"), busy),
        }
        if flops:
            row["GFLOP"] = flops[name.strip()] / 1e9 if name.strip() in flops else None
        rows.append(row)
    return rows


def category_rows(work: list[Work], steps: int) -> list[Row]:
    """Make a row per kind of work, the largest first, with milliseconds per step in each phase."""
    times: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for one in work:
        times[category(one.name)][one.phase] += one.duration / steps / 1e3
    total = sum(one.duration for one in work) / steps / 1e3
    phases = [name for name in (*PHASES, "other") if any(name in row for row in times.values())]
    return [
        {"kind": kind}
        | {name: row.get(name, 0.0) for name in phases}
        | {"step": sum(row.values()), "share_%": _percent(sum(row.values()), total)}
        for kind, row in sorted(times.items(), key=lambda item: -sum(item[1].values()))
    ]


def kernel_rows(work: list[Work], steps: int) -> list[Row]:
    """Make a row per kernel of each phase and of the whole step, the longest first within its range."""
    rows = []
    for name in (*PHASES, "other", "step"):
        chosen = [one for one in work if name in (one.phase, "step")]
        busy = sum(one.duration for one in chosen)
        by_name: dict[str, list[float]] = defaultdict(list)
        for one in chosen:
            by_name[one.name].append(one.duration)
        ordered = sorted(by_name.items(), key=lambda item: -sum(item[1]))
        for rank, (kernel, times) in enumerate(ordered, start=1):
            rows.append(
                {
                    "range": name,
                    "rank": rank,
                    "calls": round(len(times) / steps),
                    "ms": sum(times) / steps / 1e3,
                    "share_%": _percent(sum(times), busy),
                    "kind": category(kernel),
                    "kernel": kernel,
                }
            )
    return rows


def _span(work: list[Work]) -> float:
    """Return the time from the first kernel to the last, in µs, summed over the occurrences of the range."""
    ends: dict[int, tuple[float, float]] = {}
    for one in work:
        first, last = ends.get(one.occurrence, (math.inf, -math.inf))
        ends[one.occurrence] = min(first, one.start), max(last, one.start + one.duration)
    return sum(last - first for first, last in ends.values())


def _percent(part: float, whole: float) -> float | None:
    return round(100 * part / whole, 2) if whole else None
