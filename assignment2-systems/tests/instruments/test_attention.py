"""The rows of `bench-attention`: what they hold, and what stands in them when something does not work."""

import json

import pytest
import torch

from cs336_systems.instruments import attention as module
from cs336_systems.instruments.attention import predicted_bytes, time_attention
from cs336_systems.instruments.options.one_gpu import BenchAttention
from cs336_systems.training.torch_attention import plain

CPU = torch.device("cpu")


def test_the_file_holds_a_row_for_each_case(tmp_path, capsys):
    BenchAttention(
        seqs=(16, 24), dims=(8, 16), batch_size=2, steps=2, warmup=1, device="cpu", modes=("eager",), out=tmp_path
    ).execute()
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
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)
    assert time_attention("plain", "compiled", "float32", 1, 8, 8, CPU, warmup=0, steps=1)["forward_ms"] > 0
    assert compiled == [{"dynamic": False}]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("batch", "seq", "dim"), [(1, 16, 16), (3, 40, 8)])
def test_prediction_is_what_autograd_keeps(batch, seq, dim, dtype):
    q, k, v = (torch.randn(batch, 1, seq, dim, dtype=dtype, requires_grad=True) for _ in range(3))
    held = {}

    def keep(tensor):
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = plain(q, k, v)
    d_out = torch.randn_like(output)
    for tensor in (q, k, v, output, d_out):
        keep(tensor)
    predicted = predicted_bytes(
        batch, {"attention": "plain", "seq": seq, "dim": dim, "dtype": str(dtype).removeprefix("torch.")}
    )
    assert predicted == sum(one.nbytes() for one in held.values())


def test_out_of_memory_is_a_row(monkeypatch, tmp_path, capsys):
    def full(q, k, v):
        if q.shape[-2] > 16:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8.00 GiB")
        return q + k + v

    monkeypatch.setattr(module, "resolve", lambda table, name: full)
    BenchAttention(seqs=(16, 32), dims=(8,), steps=1, warmup=0, device="cpu", modes=("eager",), out=tmp_path).execute()
    rows = json.loads((tmp_path / "bench_attention.json").read_text(encoding="utf-8"))["rows"]
    assert [row["status"] for row in rows] == ["ok", "out of memory"]
    assert rows[1]["seq"] == 32
    assert "out of memory" in " ".join(capsys.readouterr().out.split())


def test_mistakes_are_one_sentence(tmp_path):
    for options, says in (({"seqs": (8, 0)}, "--seqs is 0"), ({"dims": ()}, "nothing to measure")):
        with pytest.raises(ValueError, match=says):
            BenchAttention(**options, device="cpu", out=tmp_path).execute()
    assert not list(tmp_path.iterdir())
