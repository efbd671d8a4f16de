"""Time one optimizer step over all parameters of a model: our kernel, Assignment 1's AdamW and PyTorch's, in float32.

`GB_per_s` counts the bytes that a step has to move: four tensors read and three written. `extra_MiB` is the peak memory
of a step minus what parameters, gradients and state hold.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import tyro

from cs336_basics.model import BasicsTransformerLM
from cs336_basics.optimizer import AdamW
from cs336_systems.instruments.kernels.comparison import compare
from cs336_systems.instruments.measure import Row, extra_bytes, median_ms
from cs336_systems.instruments.options.common import Measurement
from cs336_systems.kernels.adamw import FusedAdamW
from cs336_systems.theory.units import FLOAT32, MIB
from cs336_systems.training.choices import SizeName, model_config
from cs336_systems.training.options import gpu_or_cpu

CANDIDATES: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "ours": FusedAdamW,
    "assignment 1": AdamW,
    "torch, foreach": partial(torch.optim.AdamW, foreach=True),
    "torch, fused": partial(torch.optim.AdamW, fused=True),
}


@dataclass(frozen=True)
class Options(Measurement):
    """Time one AdamW step over all parameters of a model."""

    sizes: tuple[SizeName, ...] = gpu_or_cpu(("small", "medium", "xl"), ("tiny",))
    """Model sizes."""
    name: str = "adamw"


def measure(make: Callable[..., torch.optim.Optimizer], case: Row, device: torch.device) -> Row:
    """Time the step of one optimizer over the parameters of one model."""
    with torch.device("meta"):
        model = BasicsTransformerLM.from_config(model_config(case["model"]))
        shapes = [parameter.shape for parameter in model.parameters()]
    rng = torch.Generator(device).manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape, generator=rng, device=device)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=rng, device=device)
    optimizer = make(parameters, lr=1e-4)
    optimizer.step()  # creates the state
    elements = sum(parameter.numel() for parameter in parameters)
    row = {"parameters": elements, "tensors": len(parameters), "ms": median_ms(optimizer.step, device)}
    row["GB_per_s"] = 7 * FLOAT32 * elements / row["ms"] / 1e6
    if device.type == "cuda":
        row["extra_MiB"] = extra_bytes(optimizer.step, device) / MIB
    return row


def main(options: Options) -> None:
    """Measure, print a table and write a file."""
    cases: list[Row] = [{"model": size} for size in options.sizes]
    compare(options, "AdamW, one step over all parameters, float32", cases, lambda: CANDIDATES, measure)


if __name__ == "__main__":
    main(tyro.cli(Options))
