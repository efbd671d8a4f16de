"""Timelines of hand-made snapshots against sums done by hand."""

import inspect
import json

import numpy as np
import pytest
import torch

from cs336_basics import model, nn_utils
from cs336_systems.instruments import memory
from cs336_systems.instruments.memory import (
    BACKWARD,
    BASE,
    REST,
    allocated_by,
    largest_allocations,
    measure_memory,
    plot_timeline,
    timeline,
)
from cs336_systems.instruments.options.one_gpu import Memory

PNG = b"\x89PNG\r\n\x1a\n"


def frame(function):
    lines, first = inspect.getsourcelines(function)
    return {"filename": inspect.getfile(function), "line": first + len(lines) - 1, "name": function.__name__}


def event(action, address, size, moment, *frames):
    return {"action": action, "addr": address, "size": size, "time_us": moment, "frames": list(frames), "stream": 0}


@pytest.fixture
def snapshot():
    """8192 bytes are there before; softmax takes 1000 (1024 with rounding), 512 of the 8192 go, and so on."""
    softmax = frame(nn_utils.softmax)
    norm = frame(model.RMSNorm.forward)
    trace = [
        event("segment_alloc", 7000, 2**21, 5),
        event("alloc", 1, 1000, 10, softmax),  # 9216
        event("alloc", 2, 2048, 20, norm),  # 11264
        event("free_requested", 1, 1000, 28),
        event("free_completed", 1, 1000, 30),  # 10240
        event("free_completed", 99, 512, 40),  # of those before: 9728
        event("alloc", 1, 4096, 1050),  # an address again, from the backward pass: 13824
        event("free_completed", 2, 2048, 1060),  # 11776
    ]
    return {"device_traces": [trace], "segments": [{"active_size": 7680}, {"active_size": 4096}]}


def test_the_curve_is_the_sum_by_hand(snapshot):
    drawn = timeline(snapshot)
    assert drawn.total.tolist() == [8192, 9216, 11264, 10240, 9728, 13824, 11776]
    assert drawn.times_ms.tolist() == [0, 0, 0.01, 0.02, 0.03, 1.04, 1.05]
    assert {name: active.tolist() for name, active in drawn.groups.items()} == {
        BASE: [8192, 8192, 8192, 8192, 7680, 7680, 7680],
        BACKWARD: [0, 0, 0, 0, 0, 4096, 4096],
        "RMSNorm": [0, 0, 2048, 2048, 2048, 2048, 0],
        "softmax": [0, 1024, 1024, 0, 0, 0, 0],
    }


def test_the_end_is_what_the_allocator_holds_even_if_the_beginning_is_lost(snapshot):
    whole = timeline(snapshot).total
    for lost in range(len(snapshot["device_traces"][0])):
        rest = snapshot | {"device_traces": [snapshot["device_traces"][0][lost:]]}
        total = timeline(rest).total
        assert total.tolist() == whole[-len(total) :].tolist()


def test_small_groups_are_put_together(snapshot):
    drawn = timeline(snapshot, top=1)
    assert list(drawn.groups) == [BASE, BACKWARD, REST]
    assert drawn.total.tolist() == timeline(snapshot).total.tolist()


def test_without_events_memory_is_flat():
    drawn = timeline({"device_traces": [[]], "segments": [{"active_size": 512}]})
    assert drawn.total.tolist() == [512]


def test_plot(snapshot, tmp_path):
    drawn = plot_timeline(snapshot, tmp_path / "new" / "memory.png", "a title")
    assert (tmp_path / "new" / "memory.png").read_bytes().startswith(PNG)
    assert drawn.total.max() == 13824


def test_long_curves_keep_their_peaks():
    total = np.random.default_rng(0).integers(0, 10**6, 100_001).astype(float)
    kept = memory._thinned(total, 1000)
    assert len(kept) <= 2002
    assert (np.diff(kept) > 0).all()
    assert kept[0] == 0
    assert kept[-1] == len(total) - 1
    assert total[kept].max() == total.max()
    assert total[kept].min() == total.min()


def test_largest_allocations(snapshot):
    assert largest_allocations(snapshot, 2) == [
        {"MiB": 4096 / 2**20, "times": 1, "allocated_by": BACKWARD},
        {"MiB": 2048 / 2**20, "times": 1, "allocated_by": "RMSNorm"},
    ]


def test_who_allocated():
    torchs = {"filename": "/site-packages/torch/nn/modules/module.py", "line": 10, "name": "_call_impl"}
    linear, swiglu = frame(model.Linear.forward), frame(model.SwiGLU.forward)
    assert allocated_by([torchs, linear, torchs, swiglu]) == "SwiGLU"
    assert allocated_by([frame(nn_utils.cross_entropy)]) == "cross_entropy"
    assert allocated_by([torchs]) == "_call_impl"
    assert allocated_by([]) == BACKWARD
    assert allocated_by([{"filename": "/gone/cs336_basics/model.py", "line": 3, "name": "forward"}]) == "forward"


def test_the_cpu_is_refused(tmp_path):
    with pytest.raises(ValueError, match="memory is read from the CUDA allocator, but the device is cpu"):
        Memory(device="cpu", out=tmp_path).execute()


def test_out_of_memory_is_a_row(tmp_path, monkeypatch):
    """With a stand-in for the GPU."""

    def measured(config, which, snapshot):
        if which == "full" and config.precision == "float32":
            raise torch.OutOfMemoryError("no memory left")
        return {"before_GB": 1.0, "peak_GB": 2.0}

    monkeypatch.setattr(memory, "resolve_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(memory, "measure_memory", measured)
    monkeypatch.setattr("cs336_systems.instruments.measure.environment", lambda device, packages: {})
    Memory(contexts=(128,), out=tmp_path).execute()
    rows = json.loads((tmp_path / "memory.json").read_text())["rows"]
    assert [(row["pass"], row["precision"], row.get("peak_GB", row["status"])) for row in rows] == [
        ("inference", "float32", 2.0), ("full", "float32", "out of memory"),
        ("inference", "bfloat16", 2.0), ("full", "bfloat16", 2.0),
    ]  # fmt: skip


@pytest.mark.gpu
def test_the_curve_is_what_the_allocator_counts(tmp_path):
    from cs336_systems.training.choices import model_config
    from cs336_systems.training.step import StepConfig, TrainingStep

    config = StepConfig(model_config("small", 256), torch.device("cuda"))
    row = measure_memory(config, "full", tmp_path / "memory_2.7B")
    assert row["peak_GB"] > row["before_GB"]
    assert (tmp_path / "memory_2.7B.png").read_bytes().startswith(PNG)
    step = TrainingStep(config)
    step.full()
    drawn = timeline(memory.record_snapshot(step, "full", tmp_path / "x.pickle"))
    assert drawn.total.max() == pytest.approx(row["peak_GB"] * 1e9, rel=0.02)
    assert {"softmax", "SwiGLU", BACKWARD} <= set(drawn.groups)
