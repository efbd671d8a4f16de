"""The rows of `bench-attention`: what they hold, and what stands in them when something does not work."""

import json
import warnings

import pytest
import torch

from cs336_systems import bench_attention
from cs336_systems.attention import causal_attention
from cs336_systems.bench_attention import BenchAttention, attention_row, guarded, predicted_bytes

CPU = torch.device("cpu")


def test_the_file_holds_a_row_for_each_case(tmp_path, capsys):
    BenchAttention(seqs=(16, 24), dims=(8, 16), batch_size=2, steps=2, warmup=1, compile=False, out=tmp_path).execute()
    record = json.loads((tmp_path / "bench_attention.json").read_text(encoding="utf-8"))
    assert {"what", "command", "device", "torch", "commit", "date"} <= record.keys()
    shapes = [(row["dim"], row["seq"]) for row in record["rows"]]
    assert shapes == [(8, 16), (8, 24), (16, 16), (16, 24)]
    for row in record["rows"]:
        assert row["status"] == "ok"
        assert row["mode"] == "eager"
        assert row["forward_ms"] > 0
        assert row["backward_ms"] > 0
    out = capsys.readouterr().out
    assert "forward ms" in out
    assert out.count("written:") == 1


def test_compiled_rows_time_the_compiled_function(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiled.append(options) or function)
    row = attention_row("plain", 1, 8, 8, "float32", CPU, compiled=True, steps=1, warmup=0)
    assert (row["mode"], row["status"], compiled) == ("compiled", "ok", [{"dynamic": False}])
    assert "predicted_MB" not in row


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("batch", "seq", "dim"), [(1, 16, 16), (3, 40, 8)])
def test_prediction_is_what_autograd_keeps(batch, seq, dim, dtype):
    q, k, v = (torch.randn(batch, 1, seq, dim, dtype=dtype, requires_grad=True) for _ in range(3))
    held = {}

    def keep(tensor):
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = causal_attention("plain")(q, k, v)
    d_out = torch.randn_like(output)
    for tensor in (q, k, v, output, d_out):
        keep(tensor)
    assert predicted_bytes("plain", batch, seq, dim, dtype.itemsize) == sum(one.nbytes() for one in held.values())


def test_prediction_by_hand():
    # 5 tensors of 8 x 16384 x 64, 2 squares a sequence and its row sums in float32, one mask of bytes
    by_hand = 5 * 33_554_432 + 8 * (2 * 268_435_456 + 16_384) * 4 + 268_435_456
    assert predicted_bytes("plain", 8, 16_384, 64, 4) == by_hand
    assert predicted_bytes("flash", 8, 16_384, 64, 4) == 5 * 33_554_432 + 8 * 16_384 * 4


def test_out_of_memory_is_a_row(monkeypatch, tmp_path, capsys):
    def full(q, k, v):
        if q.shape[-2] > 16:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8.00 GiB")
        return q + k + v

    monkeypatch.setattr(bench_attention, "causal_attention", lambda name: full)
    BenchAttention(seqs=(16, 32), dims=(8,), steps=1, warmup=0, compile=False, out=tmp_path).execute()
    rows = json.loads((tmp_path / "bench_attention.json").read_text(encoding="utf-8"))["rows"]
    assert [row["status"] for row in rows] == ["ok", "out of memory"]
    assert rows[1]["seq"] == 32
    assert "out of memory" in " ".join(capsys.readouterr().out.split())


def test_an_interrupted_run_keeps_its_rows(monkeypatch, tmp_path):
    def interrupted(q, k, v):
        if q.shape[-2] > 16:
            raise KeyboardInterrupt
        return q + k + v

    monkeypatch.setattr(bench_attention, "causal_attention", lambda name: interrupted)
    with pytest.raises(KeyboardInterrupt):
        BenchAttention(seqs=(16, 32), dims=(8,), steps=1, warmup=0, compile=False, out=tmp_path).execute()
    assert len(json.loads((tmp_path / "bench_attention.json").read_text(encoding="utf-8"))["rows"]) == 1


def test_guarded_says_why():
    def fails(error, *warned):
        def function():
            for text in warned:
                warnings.warn(text, stacklevel=1)
            raise error

        return guarded(function)

    assert guarded(lambda: {"ms": 1.0}) == {"ms": 1.0}
    assert fails(NotImplementedError("no float64\nsecond line")) == {
        "status": "unsupported",
        "reason": "NotImplementedError: no float64",
    }
    # what PyTorch 2.11 and 2.13 say when a single backend is allowed
    row = fails(
        RuntimeError("No available kernel. Aborting execution."),
        "Memory efficient kernel not used because: (Triggered internally at sdp_utils.cpp:1.)",
        "Memory Efficient attention has been runtime disabled. (Triggered internally at sdp_utils.cpp:2.)",
        "Flash attention kernel not used because: (Triggered internally at sdp_utils.cpp:3.)",
        "Expected query, key and value to all be of dtype: {Half, BFloat16}. (Triggered internally at x.h:4.)",
    )
    assert row["reason"] == "Expected query, key and value to all be of dtype: {Half, BFloat16}."
    assert fails(RuntimeError("backend='inductor' raised:\nOutOfMemoryError: CUDA out of memory.")) == {
        "status": "out of memory"
    }
    with pytest.raises(RuntimeError, match="illegal memory access"):  # nothing measured after it would be true
        fails(RuntimeError("CUDA error: an illegal memory access was encountered"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seqs": (0,)}, "seqs has 0, but must be at least 1"),
        ({"dims": ()}, "dims is empty"),
        ({"steps": 0}, "steps has 0"),
        ({"warmup": -1}, "warmup has -1, but must be at least 0"),
        ({"eager": False, "compile": False}, "drop one of them"),
    ],
)
def test_mistakes_are_one_sentence(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        BenchAttention(**options, out=tmp_path).execute()
    assert not list(tmp_path.iterdir())
