"""Time the fused head and loss against Assignment 1's and PyTorch's, eager and compiled, in bfloat16.

Times are of forward and backward pass together. `extra_MiB` is the peak memory minus what was held before: logits,
gradients and temporary tensors.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import tyro
from torch.nn import functional as F

from cs336_systems.instruments.kernels.comparison import compare, eager_and_compiled
from cs336_systems.instruments.measure import Row, extra_bytes, median_ms
from cs336_systems.instruments.options.common import Measurement
from cs336_systems.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from cs336_systems.theory.units import MIB
from cs336_systems.training.options import gpu_or_cpu

#: Tokens, d_model and vocabulary.
SHAPES = (
    (8192, 768, 10_000),
    (32_768, 768, 10_000),
    (8192, 768, 50_257),
    (16_384, 1600, 50_257),
    (32_768, 2560, 50_257),
    (8192, 4096, 151_936),
    (32_768, 4096, 151_936),
)


@dataclass(frozen=True)
class Options(Measurement):
    """Time the fused head and loss against Assignment 1's and PyTorch's."""

    shapes: tuple[tuple[int, int, int], ...] = gpu_or_cpu(SHAPES, ((40, 16, 100),))
    """Tokens, d_model and vocabulary of each case."""
    name: str = "linear_cross_entropy"


def torch_loss(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Compute logits and loss with PyTorch's operators."""
    return F.cross_entropy(F.linear(hidden, weight), targets)


def measure(loss: Callable[..., torch.Tensor], case: Row, device: torch.device) -> Row:
    """Time one implementation at one shape."""
    tokens, d_model, vocab = case["tokens"], case["d_model"], case["vocab"]
    rng = torch.Generator(device).manual_seed(0)
    options: dict[str, Any] = {"generator": rng, "device": device, "dtype": torch.bfloat16}
    hidden = torch.randn(tokens, d_model, **options).requires_grad_()
    weight = torch.randn(vocab, d_model, **options).mul_(d_model**-0.5).requires_grad_()
    targets = torch.randint(vocab, (tokens,), generator=rng, device=device)

    def step() -> tuple[torch.Tensor, ...]:
        value = loss(hidden, weight, targets)
        return value, *torch.autograd.grad(value, (hidden, weight))

    row = {"loss": step()[0].item(), "ms": median_ms(step, device)}
    row["model_tflops"] = 6 * tokens * d_model * vocab / row["ms"] / 1e9  # of the three matmuls that are needed
    if device.type == "cuda":
        row["extra_MiB"] = extra_bytes(step, device) / MIB
    return row


def main(options: Options) -> None:
    """Measure, print a table and write a file."""
    cases = [dict(zip(("tokens", "d_model", "vocab"), shape)) for shape in options.shapes]
    functions = {"ours": linear_cross_entropy, "assignment_1": linear_cross_entropy_reference, "torch": torch_loss}
    what = "head and loss, forward and backward, bfloat16"
    compare(options, what, cases, lambda: eager_and_compiled(**functions), measure)


if __name__ == "__main__":
    main(tyro.cli(Options))
