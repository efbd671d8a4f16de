"""What a GPU does during training steps: the time of its kernels by kind, from PyTorch's profiler."""

from collections import defaultdict
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, schedule

from cs336_basics.strategy import SingleDevice

#: Kind of kernel -> parts of the names of its kernels.
_KINDS = {
    "matmuls": ("gemm", "nvjet", "cutlass", "xmma"),
    "optimizer and clipping": ("multi_tensor", "foreach", "lpnorm"),
    "copies": ("memcpy", "memset"),
    "fused by torch.compile": ("triton_",),
}


class ProfiledDevice(SingleDevice):
    """A single device that tells the profiler when a step has ended."""

    def __init__(self, device: str, steps: int) -> None:
        super().__init__(device)
        activity = ProfilerActivity.CUDA if self.device.type == "cuda" else ProfilerActivity.CPU
        # Start after compilation and the first evaluation.
        self.profiler = profile(activities=[activity], schedule=schedule(wait=25, warmup=4, active=steps))

    def step(self, model: nn.Module, optimizer: torch.optim.Optimizer, max_grad_norm: float) -> torch.Tensor:
        norm = super().step(model, optimizer, max_grad_norm)
        self.profiler.step()
        return norm


def kernel_times(profiler: profile, steps: int) -> dict[str, Any]:
    """Return the GPU's milliseconds per step: in all, busy, by kind of kernel, and of the slowest kernels."""
    by_name: dict[str, float] = defaultdict(float)
    begin, end = float("inf"), 0.0
    for event in profiler.events() or []:
        if event.device_type != torch.autograd.DeviceType.CUDA or event.name.startswith("ProfilerStep"):
            continue
        by_name[event.name] += event.time_range.elapsed_us() / 1e3 / steps
        begin, end = min(begin, event.time_range.start), max(end, event.time_range.end)
    by_kind: dict[str, float] = defaultdict(float)
    for name, time in by_name.items():
        by_kind[_kind(name)] += time
    busy = sum(by_kind.values())
    if not busy:
        return {"kinds_ms": {}, "kernels_ms": {}}
    largest = sorted(by_name.items(), key=lambda item: -item[1])[:15]
    return {
        "step_ms": (end - begin) / 1e3 / steps,
        "busy_ms": busy,
        "kinds_ms": dict(sorted(by_kind.items(), key=lambda item: -item[1])),
        "kernels_ms": {name[:120]: time for name, time in largest},
    }


def _kind(kernel: str) -> str:
    name = kernel.lower()
    return next((kind for kind, parts in _KINDS.items() if any(part in name for part in parts)), "other")
