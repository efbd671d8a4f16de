"""The overhead model of bucketed DDP, fitted to overheads that are known."""

import json

import pytest
import torch

from cs336_systems.instruments.bucket_fit import fit, gradients_of
from cs336_systems.instruments.options.on_paper import FitBuckets
from cs336_systems.parallel.overlapped import fill_buckets
from cs336_systems.theory.units import MIB

ALL_REDUCE = {"rows": [{"size_MB": 1, "S/t_GB/s": 3.0}, {"size_MB": 100, "S/t_GB/s": 50.0}]}


def measured(sizes, call_ms, slowdown_ms, key="bucket_MiB"):
    """A result of bench-ddp that the model describes exactly."""
    result = {"size": "small", "context": 128, "device": "a device", "rows": [{"variant": "none"}]}
    for size in sizes:
        buckets = fill_buckets(gradients_of(result), size)
        last_s = sum(parameter.nbytes for parameter in buckets[-1]) / 50e9
        overhead = slowdown_ms + last_s * 1e3 + len(buckets) * call_ms
        result["rows"].append({"variant": "bucketed", key: size, "exposed_ms": overhead})
    result["rows"].append({"variant": "bucketed", key: "auto", "exposed_ms": 1e9})
    return result


def test_the_unknowns_are_found():
    fitted = fit(measured([1, 10, 100], 0.25, 7.0), ALL_REDUCE)
    assert fitted.call_ms == pytest.approx(0.25)
    assert fitted.slowdown_ms == pytest.approx(7.0)
    assert fitted.predicted_ms() == pytest.approx(fitted.measured_ms)
    assert fitted.bytes_per_second == 50e9
    assert fitted.total_bytes == sum(parameter.nbytes for parameter in gradients_of({"size": "small", "context": 128}))
    assert fitted.messages == sorted(fitted.messages, reverse=True)
    assert fitted.optimum_mib() == pytest.approx((0.25e-3 * fitted.total_bytes * 50e9) ** 0.5 / MIB)


def test_older_files_call_the_unit_mb():
    old = fit(measured([1, 10, 100], 0.25, 7.0, key="bucket_MB"), ALL_REDUCE)
    assert old == fit(measured([1, 10, 100], 0.25, 7.0), ALL_REDUCE)


def test_one_size_is_too_few():
    with pytest.raises(ValueError, match="has 1 bucket sizes, but two unknowns need at least 2"):
        fit(measured([1], 0.25, 7.0), ALL_REDUCE)


def test_the_command(tmp_path, capsys):
    (tmp_path / "ddp.json").write_text(json.dumps(measured([1, 10, 100], 0.25, 7.0)))
    (tmp_path / "all_reduce.json").write_text(json.dumps(ALL_REDUCE))
    FitBuckets("cpu", ddp=tmp_path / "ddp.json", all_reduce=tmp_path / "all_reduce.json", out=tmp_path).execute()
    result = json.loads((tmp_path / "bucket_fit.json").read_text())
    assert result["slowdown_ms"] == pytest.approx(7.0)
    assert [row["bucket_MiB"] for row in result["rows"]] == [1, 10, 100]
    assert "optimum MiB" in capsys.readouterr().out


@pytest.mark.parametrize("size_mib", [1, 100, None, "auto"])
def test_buckets_hold_every_parameter_once_in_reverse(size_mib):
    parameters = gradients_of({"size": "small", "context": 128})
    filled = fill_buckets(parameters, size_mib)
    assert [id(p) for bucket in filled for p in bucket] == [id(p) for p in reversed(parameters)]
    if isinstance(size_mib, int):
        assert all(len(bucket) == 1 or sum(p.nbytes for p in bucket) <= size_mib * MIB for bucket in filled)
    assert len(fill_buckets([torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2).double())], None)) == 2
