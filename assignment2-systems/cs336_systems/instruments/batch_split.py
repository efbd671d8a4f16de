"""Check whether two half batches give a whole batch's gradient, bit for bit, in plain PyTorch.

In exact arithmetic the mean of their gradients is that gradient. In floating point it is another order of summation, so
that last bits differ wherever a matmul adds up the rows of the whole batch one after the other. The course's
`test_fsdp_correctness[fp32]` asks for equal bits; the model here has the layers and sizes of that test.
"""

import platform

import torch
import tyro
from torch import Tensor, nn

VOCAB_SIZE, D_MODEL, D_FF, BATCH, LENGTH = 100, 64, 128, 20, 8
LEARNING_RATE = 0.01


def model() -> nn.Module:
    """Build the course's toy model from PyTorch's own modules."""
    torch.manual_seed(42)
    return nn.Sequential(
        nn.Embedding(VOCAB_SIZE, D_MODEL),
        nn.RMSNorm(D_MODEL, eps=1e-5),
        nn.Linear(D_MODEL, D_FF, bias=False),
        nn.ReLU(),
        nn.RMSNorm(D_FF, eps=1e-5),
        nn.Linear(D_FF, D_MODEL, bias=False),
        nn.Linear(D_MODEL, VOCAB_SIZE, bias=False),
    )


def gradients(net: nn.Module, ids: Tensor, labels: Tensor) -> list[Tensor]:
    """Compute the gradients of the mean loss at the last positions, one for each parameter."""
    loss = nn.functional.cross_entropy(net(ids)[:, -1], labels)
    return list(torch.autograd.grad(loss, list(net.parameters())))


def main(device: str = "cpu") -> None:
    """Print, for each parameter, how many elements of a whole batch's gradient differ from those of two halves.

    Args:
        device: cpu or cuda.
    """
    net = model().to(device)
    torch.manual_seed(123)
    ids = torch.randint(VOCAB_SIZE, (BATCH, LENGTH)).to(device)
    labels = torch.randint(VOCAB_SIZE, (BATCH,)).to(device)
    whole = gradients(net, ids, labels)
    halves = [gradients(net, *half) for half in zip(ids.chunk(2), labels.chunk(2))]
    where = torch.cuda.get_device_name(device) if device == "cuda" else platform.processor() or platform.machine()
    print(f"PyTorch {torch.__version__}, {where}, {torch.get_num_threads()} threads")
    print(f"{'parameter':12}{'elements':>10}{'other gradients':>18}{'other weights after a step':>28}")
    for (name, weight), expected, *parts in zip(net.named_parameters(), whole, *halves):
        mean = sum(parts) / 2
        step, other_step = weight - LEARNING_RATE * expected, weight - LEARNING_RATE * mean
        counts = [int((a != b).sum()) for a, b in ((expected, mean), (step, other_step))]
        print(f"{name:12}{weight.numel():10}{counts[0]:18}{counts[1]:28}")


if __name__ == "__main__":
    tyro.cli(main)
