"""Failures as rows, what a table shows, and what a file holds."""

import json
import warnings
from dataclasses import dataclass

import pytest
import torch

from cs336_systems.instruments import measure
from cs336_systems.instruments.measure import (
    ResultFile,
    cartesian,
    median_ms,
    or_out_of_memory,
    print_table,
    run_grid,
    times_ms,
    try_measure,
    write_result,
)
from cs336_systems.instruments.options.common import Measurement, check_options
from cs336_systems.training.options import gpu_or_cpu

CPU = torch.device("cpu")


@pytest.fixture
def file(tmp_path):
    return ResultFile(tmp_path / "new", "x", "this", CPU, batch=3)


def rows_in(file):
    return json.loads(file.path.read_text(encoding="utf-8"))["rows"]


def raises(error, *warned):
    def function():
        for text in warned:
            warnings.warn(text, stacklevel=1)
        raise error

    return function


def test_a_row_has_its_status():
    assert try_measure(lambda: {"ms": 1.0}) == {"ms": 1.0, "status": "ok"}
    assert try_measure(lambda: {"status": "wrong"}) == {"status": "wrong"}


def test_what_does_not_work_says_why():
    assert try_measure(raises(NotImplementedError("no float64\nsecond line"))) == {
        "status": "unsupported",
        "reason": "NotImplementedError: no float64",
    }
    # what PyTorch 2.11 and 2.13 say when a single backend is allowed
    row = try_measure(
        raises(
            RuntimeError("No available kernel. Aborting execution."),
            "Memory efficient kernel not used because: (Triggered internally at sdp_utils.cpp:1.)",
            "Memory Efficient attention has been runtime disabled. (Triggered internally at sdp_utils.cpp:2.)",
            "Flash attention kernel not used because: (Triggered internally at sdp_utils.cpp:3.)",
            "Expected query, key and value to all be of dtype: {Half, BFloat16}. (Triggered internally at x.h:4.)",
        )
    )
    assert row["reason"] == "Expected query, key and value to all be of dtype: {Half, BFloat16}."


def test_out_of_memory_is_a_row_and_a_lost_device_is_not():
    for error in (torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("raised:\nCUDA out of memory.")):
        assert try_measure(raises(error)) == {"status": "out of memory"}
    with pytest.raises(RuntimeError, match="illegal memory access"):  # nothing measured after it would be true
        try_measure(raises(RuntimeError("CUDA error: an illegal memory access was encountered")))
    with pytest.raises(RuntimeError, match="a bug"):
        or_out_of_memory(raises(RuntimeError("a bug")))


def test_the_last_axis_changes_fastest():
    assert cartesian(a=(1, 2), b="xy") == [
        {"a": 1, "b": "x"},
        {"a": 1, "b": "y"},
        {"a": 2, "b": "x"},
        {"a": 2, "b": "y"},
    ]


def test_a_grid_that_breaks_off_keeps_its_rows(file):
    def measured(case):
        if case["a"] == 3:
            raise KeyboardInterrupt
        return {"ms": 2.0 * case["a"]}

    with pytest.raises(KeyboardInterrupt):
        run_grid(cartesian(a=(1, 2, 3, 4)), measured, file)
    assert rows_in(file) == [{"a": 1, "status": "ok", "ms": 2.0}, {"a": 2, "status": "ok", "ms": 4.0}]


def test_an_empty_grid_is_refused(file):
    with pytest.raises(ValueError, match="nothing to measure"):
        run_grid(cartesian(a=(1, 2), b=()), lambda case: {}, file)


def test_the_file_says_where_the_rows_come_from(tmp_path, capsys):
    path = write_result(Measurement(name="adamw", out=tmp_path), "a step", [{"ms": 1.5}], CPU, tokens=7)
    record = json.loads(path.read_text(encoding="utf-8"))
    assert {"what", "command", "device", "torch", "commit", "date", "rows"} <= record.keys()
    assert (record["what"], record["tokens"], record["rows"]) == ("a step", 7, [{"ms": 1.5}])
    assert capsys.readouterr().out == f"written: {path}\n"


def shown(capsys, monkeypatch, *arguments, **options):
    monkeypatch.setenv("COLUMNS", "100")
    print_table(*arguments, **options)
    return capsys.readouterr().out


def test_settings_that_all_rows_share_stand_in_the_title(capsys, monkeypatch):
    rows = [{"a": 1, "b": 2, "x": [5], "status": "ok"}, {"a": 1, "b": 3, "x": [6], "status": "ok"}]
    printed = shown(capsys, monkeypatch, "t", rows, settings=("a", "b"), common={"loss": "plain"})
    title, _, table = printed.partition("┏")
    assert title.strip() == "t: a 1, loss plain"
    assert "b" in table
    assert not any(word in table for word in ("a", "x", "status"))


def test_reasons_stand_below_the_table(capsys, monkeypatch):
    rows = [{"attention": "plain", "ms": 1.0, "status": "ok"}]
    rows += 2 * [{"attention": "flex", "status": "unsupported", "reason": "Error: [no] kernel"}]
    _, _, below = shown(capsys, monkeypatch, "t", rows).partition("└")
    assert below.count("flex: Error: [no] kernel") == 1
    table = shown(capsys, monkeypatch, "t", rows, ("ms", "attention", "gone"))
    assert table.index("ms") < table.index("attention") < table.index("status")
    assert "gone" not in table


def test_names_are_not_cut_off(capsys, monkeypatch):
    times = dict.fromkeys(("forward_ms", "backward_ms", "both_ms", "forward_TFLOP/s", "both_TFLOP/s"), 1.0)
    row = {"seq": 65536, "attention": "flash-pytorch", **times, "peak_MB": 1.0, "status": "out of memory"}
    printed = shown(capsys, monkeypatch, "t", [row])
    assert "…" not in printed
    assert all(name in printed for name in ("flash-pytorch", "out of memory", "65536"))
    assert max(map(len, printed.splitlines())) <= 100


@pytest.mark.parametrize(
    ("value", "cell"),
    [
        (None, ""), ("x", "x"), (16384, "16384"), (0.0, "0"), (7.0, "7.00"), (35.23, "35.2"), (99.96, "100"),
        (0.012345, "0.0123"), (-123.4, "-123"), (20813.7, "20,814"), (1.23e-6, "1.23e-06"), (float("nan"), "nan"),
    ],
)  # fmt: skip
def test_cells(value, cell):
    assert measure._cell(value, 3) == cell


def test_times():
    calls = []
    assert len(times_ms(lambda: calls.append(1), CPU, warmup=2, steps=3)) == 3
    assert len(calls) == 5
    assert median_ms(lambda: None, CPU, rep_ms=1) >= 0


@dataclass(frozen=True)
class Command(Measurement):
    sizes: tuple[int, ...] = gpu_or_cpu((8, 16), (1, 2))
    group_size: int | None = None
    warmup: int = 0


def test_defaults_depend_on_the_machine(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert (Command().sizes, Command().device) == ((8, 16), "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert (Command().sizes, Command().device) == ((1, 2), "cpu")


def test_numbers_that_are_too_small_are_refused():
    check_options(Command(), "sizes", "group_size")
    check_options(Command(), "warmup", least=0)
    with pytest.raises(ValueError, match="--sizes is 0, but must be at least 1"):
        check_options(Command(sizes=(4, 0)), "sizes")
    with pytest.raises(ValueError, match="--group-size is -1, but must be at least 1"):
        check_options(Command(group_size=-1), "group_size")
