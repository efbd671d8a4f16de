"""A profile of a tiny model on the CPU."""

import gzip
import json

import pytest
import torch

from cs336_basics.model import ModelConfig, scaled_dot_product_attention
from cs336_systems.instruments import profile
from cs336_systems.instruments.options.one_gpu import Profile
from cs336_systems.instruments.profile import annotated_attention, flops_by_part, nsys_command


def test_annotated_attention_is_assignment_1s():
    q, k, v = torch.randn(3, 2, 4, 9, 8)
    mask = torch.ones(9, 9, dtype=torch.bool).tril()
    torch.testing.assert_close(
        annotated_attention(q, k, v), scaled_dot_product_attention(q, k, v, mask), rtol=0, atol=0
    )


def test_flops_by_part():
    flops = flops_by_part(ModelConfig(67, 10, d_model=32, num_layers=3, num_heads=4), batch_size=2)
    assert flops["scores"] == flops["output"] == 3 * 2 * 4 * 2 * 10 * 10 * 8
    assert flops["softmax"] == 3 * 2 * 4 * 5 * 10 * 10


def test_profile_on_the_cpu(tmp_path, capsys):
    Profile(size="tiny", context=16, warmup=1, steps=2, device="cpu", out=tmp_path).execute()
    record = json.loads((tmp_path / "profile.json").read_text())
    ranges = {row["range"].strip(): row for row in record["ranges"]}
    assert {"forward", "scores", "softmax", "output", "loss", "backward", "optimizer", "step"} <= set(ranges)
    parts = sum(ranges[part]["busy_ms"] for part in ("scores", "softmax", "output"))
    assert 0 < parts < ranges["forward"]["busy_ms"] <= ranges["forward"]["span_ms"] * 1.001
    # Of 4 blocks: 7 linear maps each, and the head. A product's backward pass has two.
    calls = {row["range"]: row["calls"] for row in record["rows"] if row["kernel"] == "aten::mm"}
    assert calls == {"forward": 29, "backward": 58, "step": 87}
    assert {row["kind"] for row in record["categories"]} >= {"matmuls", "elementwise", "reductions"}
    assert record["context"] == 16
    with gzip.open(tmp_path / "profile.trace.json.gz") as file:
        assert json.load(file)["traceEvents"]
    assert capsys.readouterr().out.count("written: ") == 2


def test_fused_attention_is_one_range(tmp_path):
    Profile(size="tiny", context=16, attention="sdpa-flash", warmup=0, steps=1, device="cpu", out=tmp_path).execute()
    ranges = {row["range"].strip() for row in json.loads((tmp_path / "profile.json").read_text())["ranges"]}
    assert "attention" in ranges
    assert "scores" not in ranges


def test_out_of_memory_is_a_row(tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(profile, "TrainingStep", full)
    Profile(size="tiny", context=16, device="cpu", out=tmp_path).execute()
    assert json.loads((tmp_path / "profile.json").read_text())["rows"] == [{"status": "out of memory"}]
    assert "out of memory" in capsys.readouterr().out


def test_nsys_command_has_the_same_settings():
    command = nsys_command(Profile(size="xl", precision="bfloat16", steps=7, name="a b"))
    assert "--under-nsys --name 'a b' --size xl --precision bfloat16 --steps 7" in command
    assert "-o 'results/a b'" in command


def test_errors_tell_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="--steps is 0"):
        Profile(steps=0, device="cpu", out=tmp_path).execute()
    with pytest.raises(ValueError, match="leave --under-nsys out"):
        Profile(size="tiny", under_nsys=True, device="cpu", out=tmp_path).execute()


@pytest.mark.gpu
def test_profile_on_the_gpu(tmp_path):
    Profile(size="small", context=256, warmup=2, steps=2, precision="bfloat16", out=tmp_path).execute()
    record = json.loads((tmp_path / "profile.json").read_text())
    ranges = {row["range"].strip(): row for row in record["ranges"]}
    assert {"forward", "scores", "softmax", "output", "loss", "backward", "optimizer", "step"} <= set(ranges)
    assert ranges["backward"]["busy_ms"] > ranges["forward"]["busy_ms"]
    assert ranges["optimizer"]["matmul_%"] == 0
    assert ranges.get("other", {"share_%": 0})["share_%"] < 2
    kinds = {row["kind"]: row for row in record["categories"]}
    assert kinds["matmuls"]["forward"] > 0
    assert kinds.get("other", {"share_%": 0})["share_%"] < 5
    Profile(size="tiny", context=64, warmup=0, steps=1, under_nsys=True, out=tmp_path).execute()
