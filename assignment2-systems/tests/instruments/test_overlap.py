"""Intervals against counting by hand, and hand-made traces against what they were made of."""

import gzip
import json
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cs336_systems.instruments.overlap import (
    StepTimeline,
    common,
    length,
    merged,
    overlap_row,
    plot_timelines,
    record_step,
    step_timeline,
)
from cs336_systems.training.step import phase

PNG = b"\x89PNG\r\n\x1a\n"
INTERVALS = st.lists(
    st.tuples(st.integers(0, 30), st.integers(0, 10)).map(lambda pair: (float(pair[0]), float(sum(pair))))
)


def unit_cells(intervals):
    """The unit intervals [i, i+1] that are covered."""
    return {i for start, end in intervals for i in range(int(start), int(end))}


@given(INTERVALS, INTERVALS)
def test_intervals_against_sets_of_unit_cells(a, b):
    union = merged(a)
    assert unit_cells(union) == unit_cells(a)
    assert length(union) == len(unit_cells(a))
    assert all(first[1] < second[0] for first, second in pairwise(union))
    both = common(union, merged(b))
    assert unit_cells(both) == unit_cells(a) & unit_cells(b)
    assert length(both) == len(unit_cells(a) & unit_cells(b))


def test_shares_by_hand():
    phases = {"forward": (0.0, 4.0), "backward": (4.0, 10.0), "optimizer": (14.0, 15.0)}
    timeline = StepTimeline(phases, [(0.0, 6.0), (7.0, 10.0), (14.0, 15.0)], [(5.0, 8.0), (9.0, 14.0)])
    row = overlap_row(timeline)
    assert row == {"compute_ms": 10, "communication_ms": 8, "in_backward_%": 50, "hidden_%": 100 * 3 / 8}


def test_without_messages_nothing_is_hidden():
    row = overlap_row(StepTimeline({}, [(0.0, 1.0)], []))
    assert row == {"compute_ms": 1, "communication_ms": 0, "in_backward_%": None, "hidden_%": None}


def event(kind, name, start, duration, **args):
    return {"ph": "X", "cat": kind, "name": name, "ts": start, "dur": duration, "tid": 1, "args": args}


def kernel(number, name, launched, start, duration):
    launch = event("cuda_runtime", "cudaLaunchKernel", launched, 1, correlation=number)
    return [launch, event("kernel", name, start, duration, correlation=number)]


def test_kernels_belong_to_the_phase_of_their_launch():
    trace = [
        {"ph": "M", "name": "process_name"},
        event("user_annotation", "forward", 0, 100),
        event("user_annotation", "backward", 100, 100),
        event("user_annotation", "optimizer", 250, 50),
        *kernel(1, "gemm", 10, 1000, 500),
        *kernel(2, "gemm", 110, 1500, 1000),
        *kernel(3, "ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)", 120, 2000, 2000),
        *kernel(4, "elementwise_kernel", 130, 2600, 400),
        *kernel(5, "div", 210, 4000, 100),  # after the backward pass: of no phase
        *kernel(6, "multi_tensor_apply", 260, 4100, 900),
    ]
    timeline = step_timeline({"traceEvents": trace})
    assert timeline.phases == {"forward": (0, 0.5), "backward": (0.5, 2.0), "optimizer": (3.1, 4.0)}
    assert timeline.communication == [(1, 3)]
    assert timeline.compute == [(0, 1.5), (1.6, 2), (3, 4)]
    assert overlap_row(timeline)["in_backward_%"] == pytest.approx(50)
    assert overlap_row(timeline)["hidden_%"] == pytest.approx(100 * 0.9 / 2)


def test_on_a_cpu_messages_are_those_of_gloo():
    trace = [
        event("user_annotation", "forward", 1000, 1000),
        event("user_annotation", "backward", 2000, 3000),
        event("cpu_op", "aten::mm", 1100, 800),
        event("cpu_op", "aten::resize_", 1200, 100),  # within the other
        event("cpu_op", "aten::mm", 2000, 2000),
        event("cpu_op", "c10d::allreduce_", 2500, 10),
        event("user_annotation", "gloo:all_reduce", 3000, 3000),
        event("user_annotation", "Optimizer.zero_grad#AdamW.zero_grad", 900, 100),
    ]
    timeline = step_timeline({"traceEvents": trace})
    assert timeline.phases == {"forward": (0, 1), "backward": (1, 4)}
    assert timeline.communication == [(2, 5)]
    assert timeline.compute == [(0.1, 0.9), (1, 3)]


def test_a_recorded_step(tmp_path):
    calls = []

    def run():
        calls.append(1)
        with phase("forward", torch.device("cpu")):
            torch.ones(64, 64) @ torch.ones(64, 64)

    trace = record_step(run, torch.device("cpu"), tmp_path / "new" / "x.trace.json.gz")
    assert len(calls) == 2
    timeline = step_timeline(trace)
    assert list(timeline.phases) == ["forward"]
    assert 0 < length(timeline.compute) <= timeline.phases["forward"][1] - timeline.phases["forward"][0]
    assert timeline.communication == []
    with gzip.open(tmp_path / "new" / "x.trace.json.gz", "rt") as file:
        assert json.load(file)["traceEvents"]


def test_plot(tmp_path):
    timeline = StepTimeline({"forward": (0.0, 1.0), "backward": (1.0, 3.0)}, [(0.0, 3.0)], [(2.0, 4.0)])
    for timelines in ({"none": timeline, "flat": timeline}, {}, {"empty": StepTimeline({}, [], [])}):
        plot_timelines(timelines, tmp_path / "new" / "x.png", "a title")
        assert (tmp_path / "new" / "x.png").read_bytes().startswith(PNG)
