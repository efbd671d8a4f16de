"""The kernels compiled for a GPU and launched, up to CUDA's driver, on any machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", minversion="3.7", reason="the driver that does nothing fits Triton 3.7")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_kernels_compile_for_hopper_and_reach_the_driver(tmp_path, dtype):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")  # compiled here, not found
    command = [
        sys.executable,
        "-m",
        "cs336_systems.instruments.kernels.host_time",
        "--dtype",
        dtype,
        "--rounds",
        "1",
        "--out",
        str(tmp_path),
    ]
    package = Path(__file__).parents[3]
    run = subprocess.run(command, cwd=package, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    rows = json.loads((tmp_path / "host_time.json").read_text())["rows"]
    assert [row["what"].split()[0] for row in rows] == ["forward", "backward", "forward"]
    assert all(row["median_us"] > 0 for row in rows)
    compiled = {path.name.split(".")[0] for path in (tmp_path / "cache").rglob("*.cubin")}
    assert compiled == {"forward_kernel", "delta_kernel", "dkdv_kernel", "dq_kernel"}
    products = [path.read_text() for path in (tmp_path / "cache").rglob("*.ptx") if "delta" not in path.name]
    assert all(("tf32" in code) == (dtype == "float32") for code in products)  # on tensor cores, both
