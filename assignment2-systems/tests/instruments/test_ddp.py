"""The command in two processes, in one, and what follows from its times."""

import json

import pytest

from cs336_basics.accounting import parameter_counts
from cs336_systems.instruments import ddp, ranks
from cs336_systems.instruments.ddp import label
from cs336_systems.instruments.options.many_gpus import BenchDdp
from cs336_systems.training.choices import model_config

PNG = b"\x89PNG\r\n\x1a\n"
SMALL = {"size": "tiny", "context": 16, "batch_size": 2, "warmup": 1, "steps": 3, "device": "cpu"}


@pytest.fixture(scope="module")
def result(workers, tmp_path_factory):
    """The folder of a whole run, and what it printed."""
    out = tmp_path_factory.mktemp("bench_ddp")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "run_on_ranks", lambda f, n, *args, **_: workers.run(f, n, *args, timeout_s=240))
        BenchDdp(processes=2, rounds=2, bucket_mib=(0.1, 25), trace=True, keep_traces=True, out=out, **SMALL).execute()
    return out


@pytest.fixture(scope="module")
def record(result):
    return json.loads((result / "bench_ddp.json").read_text())


def test_rows(record):
    rows = record["rows"]
    assert [label(row) for row in rows] == [
        "none", "naive", "flat", "overlapped", "bucketed 0.1 MiB", "bucketed 25 MiB", "torch-ddp 25 MiB"
    ]  # fmt: skip
    assert {row["status"] for row in rows} == {"ok"}
    assert (record["processes"], record["rounds"], record["mode"]) == (2, 2, "eager")
    gradients = 4 * sum(parameter_counts(model_config("tiny", 16)).values())
    for row in rows:
        assert len(row["round_ms"]) == 2
        assert row["forward_backward_ms"] + row["after_backward_ms"] + row["optimizer_ms"] >= 0
        assert row["tok/s"] == pytest.approx(2 * 2 * 16 / row["step_ms"] * 1e3)
        assert row["sent_MB"] == pytest.approx(0 if row["variant"] == "none" else gradients / 1e6)
        assert "peak_GB" not in row or row["peak_GB"] > 0


def test_exposed_communication_is_what_exceeds_the_floor(record):
    floor, *others = record["rows"]
    assert "exposed_ms" not in floor
    for row in others:
        assert row["exposed_ms"] == pytest.approx(row["step_ms"] - floor["step_ms"])
        assert row["exposed_%"] == pytest.approx(100 * row["exposed_ms"] / row["step_ms"])
        assert row["beyond_paced_%"] == pytest.approx(100 * (row["paced_ms"] / floor["paced_ms"] - 1))


def test_overlap(record, result):
    rows = {label(row): row for row in record["rows"]}
    assert rows["none"]["communication_ms"] == 0
    assert rows["none"]["hidden_%"] is None
    for name in ("naive", "flat"):
        assert rows[name]["communication_ms"] > 0
        assert rows[name]["in_backward_%"] == 0
    for name in ("overlapped", "bucketed 0.1 MiB"):
        assert 0 < rows[name]["in_backward_%"] <= 100
        assert 0 <= rows[name]["hidden_%"] <= 100
    assert (result / "bench_ddp.png").read_bytes().startswith(PNG)
    assert len(list(result.glob("bench_ddp_*.trace.json.gz"))) == len(rows)


def test_one_process_works_too(workers, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ranks, "run_on_ranks", lambda f, n, *args, **_: workers.run(f, n, *args))
    variants = ("none", "overlapped", "bucketed", "torch-ddp")
    BenchDdp(processes=1, rounds=1, variants=variants, bucket_mib=(1,), out=tmp_path, **SMALL).execute()
    rows = json.loads((tmp_path / "bench_ddp.json").read_text())["rows"]
    assert [(row["status"], row["sent_MB"]) for row in rows] == [("ok", 0)] * 4
    assert not (tmp_path / "bench_ddp.png").exists()
    printed = capsys.readouterr().out
    assert "peaks of memory are not measured" in printed
    assert "profiled" not in printed


def test_without_the_floor_nothing_is_compared():
    rows = [{"variant": "naive", "step_ms": 2.0}]
    ddp._compare_with_floor(rows)
    assert rows == [{"variant": "naive", "step_ms": 2.0}]
