"""The command's tables: the course's numbers, and none that is cut off."""

import json
import math
from pathlib import Path

import pytest

from cs336_systems.instruments.options.on_paper import Accounting


def refuse(constant):
    raise AssertionError(f"{constant} is no JSON")


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    Accounting(out=tmp_path, device="cpu").execute()
    text = (tmp_path / "accounting.json").read_text(encoding="utf-8")
    result = json.loads(text, parse_constant=refuse)
    rows = {}
    for row in result["rows"]:
        rows.setdefault(row["table"].partition(":")[0], []).append(row)
    sharded = {row["what"]: row["devices"] for row in rows["communication_accounting (a, b)"]}
    assert (sharded["sharded, below 95 GB each"], sharded["the same and two gathered blocks"]) == (61, 69)
    bound = rows["communication_accounting (c, d)"]
    assert (bound[0]["X"], bound[0]["Y"], bound[0]["batch"]) == (16, 4, 20_445)
    never = {
        row["strategy"]: row["bound_from_per_device"]
        for row in rows["data_parallel_calcs, fsdp_calcs, tp_calcs, fsdp_tp_calcs"]
    }
    assert never["TP"] == "never"
    assert [row["best"] for row in rows["ddp_bucketed_benchmarking (b)"]].count("best") == 1

    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if not line.startswith("written")]
    assert max(map(len, lines)) <= 100
    for line in lines:  # no table is cut
        assert not line.startswith("│") or line.endswith("│")
    assert "Gradient accumulation" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"world_size": 1}, "--world-size is 1, but must be at least 2"),
        ({"ring": 1}, "--ring is 1, but must be at least 2"),
        ({"memory_tokens": 0}, "--memory-tokens is 0, but must be at least 1"),
        ({"link_gb_per_s": 0.0}, "--link-gb-per-s is 0.0, but must be positive"),
        ({"call_overhead_us": math.inf}, "--call-overhead-us is inf, but must be positive"),
        ({"memory_tokens": 20_000}, "20000 tokens put 175.5 GB on every device, which has 95; choose fewer"),
    ],
)
def test_impossible_options(options, message):
    with pytest.raises(ValueError, match=message):
        Accounting(out=Path("unused"), device="cpu", **options).execute()
