"""Bandwidths by hand, and the command with two processes of its own."""

import json

import pytest

from cs336_systems.instruments.all_reduce import summarize
from cs336_systems.instruments.options.many_gpus import BenchAllreduce


def test_bandwidths_by_hand():
    """100 MB among 4 take 2 ms in the slowest process: 50 GB/s, and 2 · 3/4 of it on a ring's links."""
    times = [[1.0, 1.0, 1.0], [1.5, 2.0, 9.0], [1.0, 1.0, 1.0], [1.0, 1.0, 30.0]]
    row = summarize({"processes": 4, "size_MB": 100}, [{"times_ms": one} for one in times])
    assert (row["ms"], row["min_ms"], row["max_ms"], row["times"]) == (2, 1.5, 9, 3)
    assert row["S/t_GB/s"] == pytest.approx(50)
    assert row["bus_GB/s"] == pytest.approx(75)


def test_grid_and_file(tmp_path, capsys):
    BenchAllreduce(
        backends=("gloo", "nccl"), processes=(2,), sizes_mb=(0.001, 0.1), rep_ms=1, device="cpu", out=tmp_path
    ).execute()
    record = json.loads((tmp_path / "bench_allreduce.json").read_text())
    assert [(row["backend"], row["processes"], row["size_MB"], row["status"]) for row in record["rows"]] == [
        ("gloo", 2, 0.001, "ok"), ("gloo", 2, 0.1, "ok"), ("nccl", 2, 0.001, "unsupported"),
        ("nccl", 2, 0.1, "unsupported"),
    ]  # fmt: skip
    for row in record["rows"][:2]:
        assert 3 <= row["times"] <= 200
        assert 0 < row["min_ms"] <= row["ms"] <= row["max_ms"]
        assert row["bus_GB/s"] == row["S/t_GB/s"] == pytest.approx(row["size_MB"] / row["ms"])  # 2 (n - 1)/n is 1
    printed = capsys.readouterr().out
    assert "nccl: each of 2 ranks needs a GPU, but there are 0" in printed
    assert printed.count("written: ") == 1


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"processes": (2, 0)}, "--processes is 0"),
        ({"sizes_mb": (1, 0)}, "--sizes-mb is 0"),
        ({"sizes_mb": ()}, "nothing to measure"),
        ({"rep_ms": 0}, "--rep-ms is 0"),
    ],
)
def test_mistakes_are_one_sentence(wrong, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        BenchAllreduce(device="cpu", out=tmp_path, **wrong).execute()
    assert not list(tmp_path.iterdir())
