"""The rows of `bench-flash`: checked results, FLOPs by hand, and what is refused."""

import json

import pytest
import torch

from cs336_systems.instruments import flash as module
from cs336_systems.instruments.flash import flash_row, largest_error, random_inputs
from cs336_systems.instruments.options.one_gpu import BenchFlash
from cs336_systems.theory.activations import attention_flops

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL = {"heads": 1, "seq": 32, "dim": 16, "dtype": "float32", "device": CPU, "rep_ms": 1}


def test_flops_by_hand():
    # seq 4, dim 16: 2 products of 4 x 16 x 4 multiply-adds are 1024 FLOPs, of which the mask leaves half
    assert attention_flops(1, 4, 16) == 512
    assert attention_flops(1, 4, 16, "backward") == 1280
    assert attention_flops(1, 4, 16, "both") == 1792
    # the leaderboard's shape
    assert attention_flops(16, 16_384, 64, "both") == 3.5 * 16 * 2 * 16_384**2 * 64


def test_the_file_holds_a_row_for_each_case(tmp_path, capsys):
    names = ("plain", "sdpa-flash", "sdpa-cudnn")
    options = {"seqs": (32, 64), "dims": (16,), "dtypes": ("float32",), "heads": 2, "rep_ms": 1, "out": tmp_path}
    BenchFlash(attentions=names, device="cpu", **options).execute()
    record = json.loads((tmp_path / "bench_flash.json").read_text(encoding="utf-8"))
    assert record["float32_matmul_precision"] == "highest"
    assert [(row["seq"], row["attention"]) for row in record["rows"]] == [(s, n) for s in (32, 64) for n in names]
    for row in record["rows"]:
        if row["attention"] == "sdpa-cudnn":  # there is no GPU
            assert row["status"] == "unsupported"
            assert "\n" not in row["reason"]
            assert "forward_ms" not in row
            continue
        assert row["status"] == "ok"
        assert row["error"] < 1e-4
        for which in ("forward", "backward", "both"):
            flops = attention_flops(2, row["seq"], 16, which)
            assert row[f"{which}_TFLOP/s"] == pytest.approx(flops / (row[f"{which}_ms"] * 1e-3) / 1e12)
    out = capsys.readouterr().out
    assert out.count("written:") == 1
    assert "sdpa-cudnn: " in out


@pytest.mark.parametrize("name", ["flash", "flash-pytorch"])
def test_ours_passes_the_check(name):
    if name == "flash":
        pytest.importorskip("triton")
    row = flash_row(name, **SMALL | {"device": DEVICE})
    assert row["status"] == "ok", row
    assert row["error"] < 1e-4
    assert row["both_ms"] > 0


def test_a_wrong_kernel_is_not_timed(monkeypatch):
    def not_causal(q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    monkeypatch.setattr(module, "resolve", lambda table, name: not_causal)
    row = flash_row("flash", **SMALL)
    assert row["status"] == "wrong"
    assert "off by" in row["reason"]
    assert "forward_ms" not in row


def test_an_error_that_is_no_number_is_wrong(monkeypatch):
    monkeypatch.setattr(module, "resolve", lambda table, name: lambda q, k, v: (q + k + v) * torch.nan)
    row = flash_row("flash", **SMALL)
    assert row["status"] == "wrong"
    json.dumps(row, allow_nan=False)


def test_out_of_memory_in_the_backward_pass_keeps_the_forward(monkeypatch):
    class Full(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v):
            return q + k + v

        @staticmethod
        def backward(ctx, d_out):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 16.00 GiB")

    monkeypatch.setattr(module, "CHECKED_SEQ", 0)
    monkeypatch.setattr(module, "resolve", lambda table, name: Full.apply)
    row = flash_row("plain", **SMALL)
    assert row["status"] == "out of memory"
    assert row["forward_ms"] > 0
    assert "backward_ms" not in row


def test_long_sequences_are_not_checked(monkeypatch):
    monkeypatch.setattr(module, "CHECKED_SEQ", 16)
    row = flash_row("plain", **SMALL)
    assert row["status"] == "ok"
    assert "error" not in row


def test_the_error_is_relative_to_the_largest_entry():
    inputs = random_inputs(1, 2, 24, 16, dtype=torch.float32, device=CPU)

    def doubled(q, k, v):
        return 2 * torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    assert largest_error(doubled, *inputs) == pytest.approx(1, rel=1e-4)


def test_an_option_below_one_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--heads is 0, but must be at least 1"):
        BenchFlash(heads=0, out=tmp_path).execute()
