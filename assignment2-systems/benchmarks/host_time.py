"""The host's part of FlashAttention: what Python does at every call, on any machine, without a GPU.

    python -m benchmarks.host_time [--dtype {bfloat16,float32}] [--rounds 5] [--out results]

A short sequence is over before the next kernel is launched, and then this time is all there is. Triton compiles the
kernels for Hopper and goes all the way to the driver, which is replaced by one that does nothing. CPU tensors stand
for those of a GPU; they are tiny, so that allocating them costs nothing either.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.runtime import driver

from cs336_systems.flash_attention import FlashAttentionTriton, triton_ops
from cs336_systems.measure import show, write_result


class NoUtils:
    """The calls into CUDA's driver, not made."""

    launch = staticmethod(lambda *arguments: None)

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        return 1, 1, 100, 0, 1024  # module, function, registers, spills, threads

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232_448, "max_num_regs": 65_536, "multiprocessor_count": 132, "warpSize": 32}

    def fill_tma_descriptor_tiled(self, *arguments: object) -> None:
        return None


class NoDriver(nvidia.CudaDriver):
    """A Hopper GPU that does nothing."""

    def __init__(self) -> None:
        self.utils = NoUtils()
        self.launcher_cls = nvidia.CudaLauncher
        self.get_current_stream = lambda device: 0
        self.get_current_device = lambda: 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def microseconds(function: Callable[[], object], calls: int = 1000) -> float:
    started = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - started) / calls * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("results"))
    arguments = parser.parse_args()
    if not hasattr(nvidia, "make_kernel_signature"):
        raise SystemExit("host_time replaces the launcher of Triton 3.7, which this Triton does not have")
    nvidia.annotate_arguments = nvidia.make_kernel_signature = lambda signature: None  # for the launcher in C
    driver.set_active(NoDriver())
    triton_ops._check_kernels_can_run = lambda Q: None
    torch.set_num_threads(1)

    q, k, v, d_out = (torch.randn(1, 2, 32, 64, dtype=getattr(torch, arguments.dtype)) for _ in range(4))
    leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
    o, log_sum_exp = triton_ops.flash_forward(q.detach(), k.detach(), v.detach(), True)
    detached = [tensor.detach() for tensor in (q, k, v)]

    def both() -> None:
        torch.autograd.grad(FlashAttentionTriton.apply(*leaves, True), leaves, d_out)

    timed: dict[str, Callable[[], object]] = {
        "forward operator, one launch": lambda: triton_ops.flash_forward(*detached, True),
        "backward operator, three launches": lambda: triton_ops.flash_backward(*detached, o, log_sum_exp, d_out, True),
        "forward and backward through autograd": both,
    }
    for function in timed.values():
        microseconds(function, 50)
    taken: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(arguments.rounds):
        for name, function in timed.items():
            taken[name].append(microseconds(function))
    rows = [
        {"what": name, "median_us": statistics.median(times), "min_us": min(times), "max_us": max(times)}
        for name, times in taken.items()
    ]
    show("Time on the host", rows)
    what = f"Python's part of FlashAttention in {arguments.dtype}, CUDA's driver left out"
    write_result(arguments.out, "host_time", what, rows, torch.device("cpu"))


if __name__ == "__main__":
    main()
