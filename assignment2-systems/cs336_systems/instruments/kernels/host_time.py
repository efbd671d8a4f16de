"""Time the host's part of FlashAttention: what Python does at every call, on any machine, without a GPU.

A short sequence is finished before the next kernel is launched, so that this time is all there is. Triton compiles the
kernels for Hopper and calls the driver, which is replaced by one that does nothing. CPU tensors stand in for GPU
tensors; they are tiny, so that allocating them costs nothing either.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import tyro
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.runtime import driver

from cs336_systems.instruments.measure import Row, print_table, write_result
from cs336_systems.instruments.options.common import Measurement
from cs336_systems.kernels.flash_attention import FlashAttentionTriton, triton_ops
from cs336_systems.training.choices import Precision


class NoUtils:
    """Stand-ins for the calls into CUDA's driver."""

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
    """Time a call, as the mean over `calls` of them."""
    started = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - started) / calls * 1e6


@dataclass(frozen=True)
class Options(Measurement):
    """Time what Python does at every call of FlashAttention; needs Triton 3.7, but no GPU."""

    dtype: Precision = "bfloat16"
    """Precision of the inputs."""
    rounds: int = 5
    """Rounds; each times everything once."""
    name: str = "host_time"


def main(options: Options) -> None:
    """Measure, print a table and write a file."""
    if not hasattr(nvidia, "make_kernel_signature"):
        raise SystemExit("host_time replaces the launcher of Triton 3.7, which this Triton does not have")
    nvidia.annotate_arguments = nvidia.make_kernel_signature = lambda signature: None  # for the launcher in C
    driver.set_active(NoDriver())
    triton_ops._check_kernels_can_run = lambda Q: None
    torch.set_num_threads(1)
    rows = host_rows(getattr(torch, options.dtype), options.rounds)
    print_table("Time on the host", rows)
    what = f"Python's part of FlashAttention in {options.dtype}, CUDA's driver left out"
    write_result(options, what, rows, torch.device("cpu"))


def host_rows(dtype: torch.dtype, rounds: int) -> list[Row]:
    """Time the forward and the backward operator, and both through autograd, in microseconds per call."""
    q, k, v, d_out = (torch.randn(1, 2, 32, 64, dtype=dtype) for _ in range(4))
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
    for _ in range(rounds):
        for name, function in timed.items():
            taken[name].append(microseconds(function))
    return [
        {"what": name, "median_us": statistics.median(times), "min_us": min(times), "max_us": max(times)}
        for name, times in taken.items()
    ]


if __name__ == "__main__":
    main(tyro.cli(Options))
