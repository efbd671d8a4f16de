"""What a program may use of its machine: CPU cores that it shares with others, and a GPU if its driver is new enough.

Imports nothing but Python's own library: `share_cores` has to be called before torch is imported. Two packages need
this file and neither imports the other, so each has the same copy of it.
"""

import ctypes
import math
import os
import sys
from pathlib import Path

#: How often an OpenMP thread looks for work before it sleeps (LOG.md has the measurements).
SPIN_COUNT = 2000


def available_cpus(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """The CPU cores that this process may use: those of its affinity, or fewer if its container has a quota."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(allowed, _cpu_quota(cgroup))))


def _cpu_quota(cgroup: Path) -> float:
    """The cores' worth of time that a container may use; infinite without a limit."""
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):  # control groups v2, v1
        try:
            quota, period = " ".join((cgroup / name).read_text() for name in names).split()
        except (OSError, ValueError):
            continue
        if quota not in ("max", "-1"):
            return int(quota) / int(period)
    return math.inf


def share_cores() -> None:
    """Make OpenMP's threads good neighbours. Call it before torch is imported; what the user has set stays.

    A thread that waits for others sleeps after a short while instead of spinning on a core that another program could
    use, and where a container's quota allows fewer cores than the machine has, there are no more threads than that.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))
    if available_cpus() < (os.cpu_count() or 1):
        os.environ.setdefault("OMP_NUM_THREADS", str(available_cpus()))


def check_driver(cuda_build: str | None) -> None:
    """Check that the NVIDIA driver, if there is one, can run a build of PyTorch.

    Drivers run what was built for their own major version of CUDA or for an older one.

    Args:
        cuda_build: the CUDA version of the build, `torch.version.cuda`; None for a build without CUDA.

    Raises:
        ValueError: the driver is too old. PyTorch itself would go on without the GPU.
    """
    version = cuda_version_of_driver()
    if not cuda_build or not version or os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return
    if version[0] < int(cuda_build.split(".")[0]):
        raise ValueError(
            f"the NVIDIA driver of this machine is too old for this PyTorch, which is built for CUDA {cuda_build}: it "
            f"runs CUDA up to {version[0]}.{version[1]}; install a newer driver, or a build for CUDA 12 with "
            "`make setup TORCH=2.10.0`, or hide the GPU with CUDA_VISIBLE_DEVICES="
        )


def cuda_version_of_driver() -> tuple[int, int] | None:
    """The newest CUDA version that the NVIDIA driver supports, such as (12, 4); None without a driver."""
    number = ctypes.c_int()
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number))
    except (OSError, AttributeError):
        return None
    return (number.value // 1000, number.value % 1000 // 10) if number.value else None


def main() -> None:
    """Say so if the driver is too old for the PyTorch that is installed, which then computes on the CPU."""
    if cuda_version_of_driver():
        import torch

        try:
            check_driver(torch.version.cuda)
        except ValueError as error:
            print(f"warning: {error}", file=sys.stderr)


if __name__ == "__main__":
    main()
