"""The fused head and loss beside Assignment 1's and PyTorch's, eager and compiled: forward and backward, bfloat16.

    python -m benchmarks.linear_cross_entropy [--out results] [--tiny]

`extra_MiB` is the peak of memory less what was held before: logits, gradients and temporaries.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from cs336_basics.strategy import resolve_device
from cs336_systems.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from cs336_systems.measure import extra_bytes, median_ms, or_out_of_memory, show, write_result

#: (tokens, d_model, vocab)
SHAPES = [
    (8192, 768, 10_000),
    (32_768, 768, 10_000),
    (8192, 768, 50_257),
    (16_384, 1600, 50_257),
    (32_768, 2560, 50_257),
    (8192, 4096, 151_936),
    (32_768, 4096, 151_936),
]
TINY = [(40, 16, 100)]


def torch_loss(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(F.linear(hidden, weight), targets)


def candidates() -> dict[str, Callable]:
    compiled = partial(torch.compile, fullgraph=True, dynamic=False)
    return {
        "ours": linear_cross_entropy,
        "ours, compiled": compiled(linear_cross_entropy),
        "assignment 1": linear_cross_entropy_reference,
        "assignment 1, compiled": compiled(linear_cross_entropy_reference),
        "torch": torch_loss,
        "torch, compiled": compiled(torch_loss),
    }


def measured(loss: Callable, shape: tuple[int, int, int], device: torch.device) -> dict:
    tokens, d_model, vocab = shape
    rng = torch.Generator(device).manual_seed(0)
    options: dict[str, Any] = {"generator": rng, "device": device, "dtype": torch.bfloat16}
    hidden = torch.randn(tokens, d_model, **options).requires_grad_()
    weight = torch.randn(vocab, d_model, **options).mul_(d_model**-0.5).requires_grad_()
    targets = torch.randint(vocab, (tokens,), generator=rng, device=device)

    def step() -> tuple[torch.Tensor, ...]:
        value = loss(hidden, weight, targets)
        return value, *torch.autograd.grad(value, (hidden, weight))

    row = {"loss": step()[0].item(), "ms": median_ms(step, device)}
    row["model_tflops"] = 6 * tokens * d_model * vocab / row["ms"] / 1e9  # the three products that must be
    if device.type == "cuda":
        row["extra_MiB"] = extra_bytes(step, device) / 2**20
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for the result")
    parser.add_argument("--tiny", action="store_true", help="one small shape, which a CPU can do")
    arguments = parser.parse_args()
    device = resolve_device("auto")
    rows = []
    for shape in TINY if arguments.tiny else SHAPES:
        torch.compiler.reset()
        for who, loss in candidates().items():
            row = {"tokens": shape[0], "d_model": shape[1], "vocab": shape[2], "who": who}
            rows.append(row | or_out_of_memory(partial(measured, loss, shape, device)))
    what = "head and loss, forward and backward, bfloat16"
    show(what, rows)
    if arguments.out:
        write_result(arguments.out, "linear_cross_entropy", what, rows, device)


if __name__ == "__main__":
    main()
