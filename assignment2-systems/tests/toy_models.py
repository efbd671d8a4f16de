"""Small models and the data to train them on, for the tests of data parallelism."""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cs336_basics.model import BasicsTransformerLM, Linear
from cs336_basics.nn_utils import cross_entropy
from cs336_basics.optimizer import AdamW
from cs336_systems.parallel import FSDP
from cs336_systems.parallel.data_parallel import DataParallel
from cs336_systems.parallel.process_group import Rank


class Toy(nn.Module):
    """What goes wrong first: a tied, a frozen and an unused weight, a layer norm, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Linear(6, 20)
        self.norm = nn.LayerNorm(20)
        self.second = Linear(20, 20)
        self.tied = Linear(20, 20)
        self.tied.weight = self.second.weight
        self.unused = Linear(3, 3)
        self.frozen = Linear(20, 20)
        self.frozen.weight.requires_grad_(False)
        self.last = Linear(20, 5)
        self.scale = nn.Parameter(torch.randn(5), requires_grad=False)
        self.shift: Tensor
        self.register_buffer("shift", torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(torch.relu(self.first(x)))
        x = self.tied(torch.relu(self.second(x)))
        return self.last(torch.relu(self.frozen(x))) * self.scale + self.shift


@dataclass
class Problem:
    """A model, a batch for each of a few steps, and a loss that is a mean over the rows of its batch."""

    model: nn.Module
    batches: list[tuple[Tensor, Tensor]]
    loss_of: Callable[[Tensor, Tensor], Tensor]

    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        return self.loss_of(model(inputs), targets)


def toy(dtype: torch.dtype, rows: int, steps: int = 5) -> Problem:
    torch.manual_seed(1)
    x, y = torch.randn(steps, rows, 6, dtype=dtype), torch.randn(steps, rows, 5, dtype=dtype)
    return Problem(Toy().to(dtype), list(zip(x, y)), nn.functional.mse_loss)


def language(dtype: torch.dtype, rows: int, steps: int = 5, **options: object) -> Problem:
    torch.manual_seed(1)
    shape = {"vocab_size": 29, "context_length": 8, "d_model": 16, "num_layers": 2, "num_heads": 2, "d_ff": 24}
    model = BasicsTransformerLM(**shape | options, dtype=dtype)
    ids = torch.randint(29, (steps, rows, 9))
    return Problem(model, [(batch[:, :-1], batch[:, 1:]) for batch in ids], cross_entropy)


MakeOptimizer = Callable[[Iterable[Tensor]], torch.optim.Optimizer]

# float32: Adam divides by the root of the squares, so that where a gradient is about 0 its rounding error decides the
# direction of the step. A large ε keeps that small.
OPTIMIZERS: dict[str, MakeOptimizer] = {
    "our AdamW": partial(AdamW, lr=1e-2),
    "torch's AdamW": partial(torch.optim.AdamW, lr=1e-2),
    "momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "AdamW with large eps": partial(AdamW, lr=1e-2, eps=1e-1),
}


def train_alone(problem: Problem, make_optimizer: MakeOptimizer) -> list[dict[str, Tensor]]:
    """The reference: one process, whole batches. The parameters after each step; the problem's model stays as it is."""
    model = copy.deepcopy(problem.model)
    optimizer = make_optimizer(model.parameters())
    history = []
    for inputs, targets in problem.batches:
        optimizer.zero_grad()
        problem.loss(model, inputs, targets).backward()
        optimizer.step()
        history.append(parameters_of(model))
    return history


def train_together(
    process: Rank, problem: Problem, wrap: Callable[[nn.Module], DataParallel], make_optimizer: MakeOptimizer
) -> list[dict[str, Tensor]]:
    """The same with every rank on its own rows. Only rank 0 knows the weights to start from."""
    model = wrap(spoiled(process, problem.model))
    optimizer = make_optimizer(model.parameters())
    history = []
    for inputs, targets in problem.batches:
        optimizer.zero_grad()
        problem.loss(model, part(process, inputs), part(process, targets)).backward()
        model.finish_gradient_synchronization()
        optimizer.step()
        history.append(parameters_of(model))
    return history


def spoiled(process: Rank, model: nn.Module) -> nn.Module:
    """A copy, with other numbers in all processes but the first."""
    model = copy.deepcopy(model)
    if process.rank:
        torch.manual_seed(process.rank)
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.data.normal_()
    return model


def part(process: Rank, rows: Tensor) -> Tensor:
    """This process's share of the rows of a batch."""
    return rows.chunk(process.world_size)[process.rank]


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters, whole."""
    if isinstance(model, FSDP):
        return model.gather_full_params()
    wrapped = model.module if isinstance(model, DataParallel) else model
    return {name: p.detach().clone() for name, p in wrapped.named_parameters()}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 0.0) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        explain = "{}: {}".format
        torch.testing.assert_close(ours[name], theirs[name], atol=tolerance, rtol=0, msg=partial(explain, name))


def gradients_of(model: nn.Module) -> dict[str, Tensor | None]:
    """All gradients, whole."""
    wrapped = model.module if isinstance(model, DataParallel) else model
    ranges = model.shard_ranges() if isinstance(model, FSDP) else {}
    gradients = {name: p.grad for name, p in wrapped.named_parameters()}
    for name, (shape, start, stop) in ranges.items():
        if (share := gradients.get(name)) is not None:  # a tied weight has two ranges and one gradient
            whole = share.new_zeros(shape.numel())
            whole[start:stop] = share
            dist.all_reduce(whole, group=model.group)
            gradients[name] = whole.view(shape)
    return gradients
