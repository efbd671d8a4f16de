"""The rows of `leaderboard-2025`, at a size for a CPU."""

import json

import pytest
import torch

from cs336_systems.instruments import leaderboard_2025 as leaderboard
from cs336_systems.instruments.options.one_gpu import Leaderboard2025
from cs336_systems.kernels import triton_support
from cs336_systems.theory.activations import attention_flops


@pytest.fixture
def command(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)  # it takes longer than all of this
    monkeypatch.setattr(leaderboard, "MATMUL_SIZE", 16)
    monkeypatch.setattr(leaderboard, "COPY_MB", 1)
    monkeypatch.setattr(triton_support, "INTERPRETED", True)
    return Leaderboard2025(
        heads=2, seq=32, dim=16, peers=("plain", "sdpa-cudnn"), rounds=2, rep_ms=1,
        device="cpu", out=tmp_path,
    )  # fmt: skip


class Ours(torch.autograd.Function):
    """Stands for the Triton function, whose interpreter is slow; it has its own tests."""

    @staticmethod
    def forward(ctx, q, k, v, is_causal):
        with torch.enable_grad():
            ctx.inputs = tuple(tensor.detach().requires_grad_() for tensor in (q, k, v))
            ctx.output = torch.nn.functional.scaled_dot_product_attention(*ctx.inputs, is_causal=is_causal)
        return ctx.output.detach()

    @staticmethod
    def backward(ctx, d_out):
        return *torch.autograd.grad(ctx.output, ctx.inputs, d_out), None


def rows_of(command):
    record = json.loads((command.out / "leaderboard_2025.json").read_text(encoding="utf-8"))
    return {row["attention"]: row for row in record["rows"]}, record


def test_the_file(command, monkeypatch, capsys):
    monkeypatch.setattr(leaderboard, "FlashAttentionTriton", Ours)
    command.execute()
    rows, record = rows_of(command)
    assert list(rows) == ["flash", "plain", "sdpa-cudnn"]
    assert record["ceilings"].keys() == {"matmul_TFLOP/s", "copy_GB/s"}
    assert rows["flash"]["error"] < 0.05
    assert rows["flash"]["vs_ours"] == 1
    assert rows["plain"]["vs_ours"] == pytest.approx(rows["plain"]["ms"] / rows["flash"]["ms"])
    assert rows["sdpa-cudnn"]["status"] == "unsupported"
    assert "ms" not in rows["sdpa-cudnn"]
    for name in ("flash", "plain"):
        row = rows[name]
        assert row["status"] == "ok"
        assert row["first_call_s"] > 0
        assert row["min_ms"] <= row["ms"] <= row["max_ms"]
        assert row["TFLOP/s"] == pytest.approx(attention_flops(2, 32, 16, "both") / row["ms"] / 1e9)
        assert row["of_matmul"] == pytest.approx(row["TFLOP/s"] / record["ceilings"]["matmul_TFLOP/s"])
    assert capsys.readouterr().out.count("written:") == 1


def test_ours_is_not_timed_when_it_is_wrong(command, monkeypatch):
    class Wrong(Ours):
        @staticmethod
        def forward(ctx, q, k, v, is_causal):
            return Ours.forward(ctx, q, k, v, False)

    monkeypatch.setattr(leaderboard, "FlashAttentionTriton", Wrong)
    command.execute()
    rows, _ = rows_of(command)
    assert rows["flash"]["status"] == "wrong"
    assert "ms" not in rows["flash"]
    assert rows["plain"]["ms"] > 0
    assert "vs_ours" not in rows["plain"]


def test_out_of_memory_in_a_later_round_is_a_row(command, monkeypatch):
    calls = []

    class Full(Ours):
        @staticmethod
        def forward(ctx, q, k, v, is_causal):
            calls.append(is_causal)
            if len(calls) > 3:  # after the first call and the check
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")
            return Ours.forward(ctx, q, k, v, is_causal)

    monkeypatch.setattr(leaderboard, "FlashAttentionTriton", Full)
    command.execute()
    rows, _ = rows_of(command)
    assert rows["flash"]["status"] == "out of memory"
    assert rows["plain"]["status"] == "ok"


def test_the_defaults_are_the_leaderboards():
    options = Leaderboard2025()
    assert (options.heads, options.seq, options.dim) == (16, 16_384, 64)


def test_without_a_gpu_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(triton_support, "INTERPRETED", False)
    with pytest.raises(ValueError, match="run it on a GPU"):
        Leaderboard2025(device="cpu", out=tmp_path).execute()
