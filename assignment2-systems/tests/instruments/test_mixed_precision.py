"""The rows of `mixed-precision`."""

import json

import pytest
import torch

from cs336_systems.instruments.mixed_precision import accumulation_rows, dtype_rows, rms_norm_rows
from cs336_systems.instruments.options.one_gpu import MixedPrecision

CPU = torch.device("cpu")


def test_accumulation_is_as_the_course_shows():
    sums = {(row["accumulator"], row["rounded_to"], row["added_as"]): row["sum"] for row in accumulation_rows()}
    assert sums["float32", "float32", "float32"] == pytest.approx(10.0001, abs=1e-4)
    assert sums["float16", "float16", "float16"] == pytest.approx(9.9531, abs=1e-4)
    assert sums["float32", "float16", "float16"] == pytest.approx(10.0021, abs=1e-4)
    assert sums["float32", "float16", "float32"] == sums["float32", "float16", "float16"]
    assert sums["bfloat16", "bfloat16", "bfloat16"] == 4  # where its spacing is more than twice 0.01


def test_dtypes_under_autocast():
    rows = dtype_rows(CPU)
    assert [(row["norm"], row["autocast"]) for row in rows] == [
        ("LayerNorm", "float16"), ("LayerNorm", "bfloat16"), ("RMSNorm", "float16"), ("RMSNorm", "bfloat16")
    ]  # fmt: skip
    for row in rows:
        half = row["autocast"]
        assert (row["parameters"], row["gradients"], row["loss"]) == ("float32", "float32", "float32")
        assert (row["fc1_output"], row["norm_output"], row["logits"]) == (half, half, half)


@pytest.mark.gpu
def test_layer_norm_is_float32_under_cuda_autocast():
    layer_norm, _, rms_norm, _ = dtype_rows(torch.device("cuda"))
    assert (layer_norm["fc1_output"], layer_norm["norm_output"], layer_norm["logits"]) == (
        "float16", "float32", "float16",
    )  # fmt: skip
    assert rms_norm["norm_output"] == "float16"


def test_our_rms_norm_keeps_its_digits():
    for row in rms_norm_rows(CPU):
        ours, plain = row["error, computed in float32"], row["error, computed in the input's dtype"]
        assert ours < torch.finfo(getattr(torch, row["input"])).eps < 1
        assert ours < plain
    assert rms_norm_rows(CPU)[1]["error, computed in the input's dtype"] == 1  # float16 overflows: all zeros


def test_the_file(tmp_path, capsys):
    MixedPrecision(out=tmp_path).execute()
    rows = json.loads((tmp_path / "mixed_precision.json").read_text(encoding="utf-8"))["rows"]
    assert [row["group"] for row in rows] == ["accumulation"] * 7 + ["dtypes"] * 4 + ["rms norm"] * 4
    assert "dtypes of a small model under autocast on" in " ".join(capsys.readouterr().out.split())
