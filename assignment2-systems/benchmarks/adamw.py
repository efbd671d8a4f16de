"""One optimizer step over all parameters of a model: ours, Assignment 1's and PyTorch's, in float32.

    python -m benchmarks.adamw [--out results] [--tiny]

`GB_per_s` counts what a step has to move: four tensors read and three written. `extra_MiB` is the peak of
memory during a step less what parameters, gradients and state hold.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from cs336_basics.model import BasicsTransformerLM, ModelConfig
from cs336_basics.optimizer import AdamW
from cs336_basics.strategy import resolve_device
from cs336_systems.adamw import FusedAdamW
from cs336_systems.measure import extra_bytes, median_ms, or_out_of_memory, show, write_result
from cs336_systems.models import MODELS

TINY = {"tiny": ModelConfig(100, 16, d_model=16, num_layers=2, num_heads=2)}
CANDIDATES: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "ours": FusedAdamW,
    "assignment 1": AdamW,
    "torch, foreach": partial(torch.optim.AdamW, foreach=True),
    "torch, fused": partial(torch.optim.AdamW, fused=True),
}


def measured(make: Callable[..., torch.optim.Optimizer], config: ModelConfig, device: torch.device) -> dict:
    with torch.device("meta"):
        shapes = [parameter.shape for parameter in BasicsTransformerLM.from_config(config).parameters()]
    rng = torch.Generator(device).manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape, generator=rng, device=device)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=rng, device=device)
    optimizer = make(parameters, lr=1e-4)
    optimizer.step()  # makes the state
    elements = sum(parameter.numel() for parameter in parameters)
    row = {"parameters": elements, "tensors": len(parameters), "ms": median_ms(optimizer.step, device)}
    row["GB_per_s"] = 7 * 4 * elements / row["ms"] / 1e6
    if device.type == "cuda":
        row["extra_MiB"] = extra_bytes(optimizer.step, device) / 2**20
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for the result")
    parser.add_argument("--tiny", action="store_true", help="one small model, which a CPU can do")
    arguments = parser.parse_args()
    device = resolve_device("auto")
    models = TINY if arguments.tiny else {name: MODELS[name] for name in ("small", "medium", "xl")}
    rows = []
    for name, config in models.items():
        for who, make in CANDIDATES.items():
            rows.append({"model": name, "who": who} | or_out_of_memory(partial(measured, make, config, device)))
    what = "AdamW, one step over all parameters, float32"
    show(what, rows)
    if arguments.out:
        write_result(arguments.out, "adamw", what, rows, device)


if __name__ == "__main__":
    main()
