"""All parts on two and four processes, what is measured before and what is not begun any more."""

import json
from types import SimpleNamespace

import pytest
import torch

from cs336_systems.instruments import scaling
from cs336_systems.instruments.measure import ResultFile
from cs336_systems.instruments.options.many_gpus import Scaling
from tests.workers import Workers

SMALL = {"size": "tiny", "context": 16, "weak_batch": 1, "strong_batch": 4, "warmup": 1, "steps": 2, "device": "cpu"}
VARIANTS = ["none", "bucketed", "torch-ddp", "fsdp", "fully-shard"]


@pytest.fixture(scope="module")
def four():
    workers = Workers(4)
    yield workers
    workers.stop()


@pytest.fixture
def here(four, monkeypatch):
    """Sets run in the tests' processes, and the 8B step, which has tests of its own, is a row."""
    sets = []

    def run(function, count, *arguments, timeout_s, **_):
        sets.append(count)
        return four.run(function, count, *arguments, timeout_s=min(timeout_s, 240))

    def eight_billion(options, device, file):
        sets.append(options.processes)
        row = {"contestant": options.contestants[0], "status": "ok", "seconds": 1.0, "tokens/s": 2.0}
        return [row | {"of_matmul": 0.5}]

    monkeypatch.setattr(scaling, "run_on_ranks", run)
    monkeypatch.setattr(scaling, "leaderboard_rows", eight_billion)
    return sets


def test_all_parts_and_no_set_twice(here, tmp_path, capsys):
    command = Scaling(processes=(1, 2, 4), sizes_mb=(0.01, 0.1), out=tmp_path, **SMALL)
    command.execute()
    rows = json.loads((tmp_path / "scaling.json").read_text())["rows"]
    assert {row["status"] for row in rows} == {"ok"}
    assert all(row["torch"] == torch.__version__.split("+")[0] for row in rows)
    assert here == [2, 4, 1, 2, 4, 1, 2, 4, 2, 4, 2, 4]
    for part in ("weak", "strong"):
        of_part = [row for row in rows if row["part"] == part]
        assert [(row["processes"], row["variant"]) for row in of_part] == [
            (1, "none"), *((2, variant) for variant in VARIANTS), *((4, variant) for variant in VARIANTS),
        ]  # fmt: skip
        alone, last = of_part[0], of_part[-1]
        sequences = 4 if part == "strong" or last["processes"] == 4 else 1
        assert last["tok/s"] == pytest.approx(sequences * 16 / last["step_ms"] * 1e3)
        assert last["efficiency_%"] == pytest.approx(100 * last["tok/s"] / 4 / alone["tok/s"])
        none = next(row for row in of_part if row["processes"] == 4 and row["variant"] == "none")
        assert last["exposed_%"] == pytest.approx(100 * (1 - none["step_ms"] / last["step_ms"]))
    states = [row for row in rows if row["part"] == "optimizer-state"]
    for row in states:
        assert row["state_MB"] == pytest.approx(row["predicted_state_MB"], rel=0.05)
    assert states[0]["state_MB"] > 3.5 * states[-1]["state_MB"]
    assert [row["processes"] for row in rows if row["part"] == "8B"] == [2, 4]
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["scaling.json", "scaling.png"]

    here.clear()
    command.execute()
    assert here == []
    assert json.loads((tmp_path / "scaling.json").read_text())["rows"] == rows
    with pytest.raises(ValueError, match=r"scaling\.json has rows with context 16, not 8; choose another --name"):
        Scaling(processes=(1,), out=tmp_path, **SMALL | {"context": 8}).execute()
    with pytest.raises(ValueError, match="has rows with variants"):
        Scaling(processes=(1,), variants=("none",), out=tmp_path, **SMALL).execute()
    assert "efficiency" in capsys.readouterr().out


def test_no_set_is_begun_that_would_not_end(here, tmp_path, monkeypatch, capsys):
    clock = iter([0.0, 1.0, 2.0, 42.0, 42.0, 43.0])  # the first set takes 40 s, and 17 are left for the second
    monkeypatch.setattr(scaling, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    Scaling(parts=("all-reduce",), processes=(2, 4), sizes_mb=(0.01,), out=tmp_path, minutes=1, **SMALL).execute()
    assert here == [2]
    assert "not measured within 1 minutes: all-reduce 4; run the same command again" in capsys.readouterr().out


def test_a_set_that_takes_too_long_is_left(tmp_path, monkeypatch, capsys):
    def never(*_, **__):
        raise TimeoutError

    monkeypatch.setattr(scaling, "run_on_ranks", never)
    Scaling(parts=("all-reduce",), processes=(2,), sizes_mb=(0.01,), out=tmp_path, **SMALL).execute()
    assert not (tmp_path / "scaling.json").exists()
    assert "not measured within 8 minutes: all-reduce 2" in capsys.readouterr().out


def test_bad_options_are_refused(tmp_path):
    with pytest.raises(ValueError, match="--strong-batch 4 does not split over 3 ranks"):
        Scaling(processes=(1, 3), out=tmp_path, **SMALL).execute()
    with pytest.raises(ValueError, match="--steps is 0"):
        Scaling(processes=(1,), out=tmp_path, **SMALL | {"steps": 0}).execute()


def test_a_file_with_the_old_name_of_a_mode_goes_on(tmp_path):
    file = ResultFile(tmp_path, "scaling", "what", torch.device("cpu"), mode="compiled")
    file.write([{"part": "weak"}])
    assert scaling.measured_before(file, {"mode": "compiled-blocks"}) == [{"part": "weak"}]
    with pytest.raises(ValueError, match="has rows with mode compiled, not eager"):
        scaling.measured_before(file, {"mode": "eager"})
