"""Training through the adapters, as the course's tests do it: each process on its rows, equal to one on all rows."""

import copy

import pytest
import torch
from torch import nn

from cs336_basics.model import Embedding, Linear
from cs336_basics.optimizer import AdamW
from tests import adapters
from tests.toy_models import assert_same, part, spoiled, toy

ROWS = 12


def train(process, problem, wrap, after_backward, before_batch=lambda model, optimizer: None):
    """The parameters that a process ends up with, and those of one process with all rows."""
    alone, together = problem.model, wrap(spoiled(process, problem.model))
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (alone, together)]
    for inputs, targets in problem.batches:
        before_batch(together, optimizers[1])
        for optimizer in optimizers:
            optimizer.zero_grad()
        problem.loss(alone, inputs, targets).backward()
        problem.loss(together, part(process, inputs), part(process, targets)).backward()
        after_backward(together, optimizers[1])
        for optimizer in optimizers:
            optimizer.step()
    return together, alone


def check_ddp(process, name, bucket_size_mb):
    problem = toy(torch.float32, ROWS)
    wraps = {
        "individual": adapters.get_ddp_individual_parameters,
        "bucketed": lambda module: adapters.get_ddp_bucketed(module, bucket_size_mb),
        "2026": adapters.get_ddp,
    }
    after = {
        "individual": adapters.ddp_individual_parameters_on_after_backward,
        "bucketed": adapters.ddp_bucketed_on_after_backward,
        "2026": adapters.ddp_on_after_backward,
    }
    before = {"bucketed": adapters.ddp_bucketed_on_train_batch_start}
    together, alone = train(process, problem, wraps[name], after[name], *filter(None, [before.get(name)]))
    assert together.module.shift.equal(alone.shift)
    assert_same(dict(together.module.named_parameters()), dict(alone.named_parameters()), 1e-6)
    assert not any(p.requires_grad for name, p in together.named_parameters() if "frozen" in name or "scale" in name)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize(
    ("name", "bucket_size_mb"),
    [("individual", None), ("2026", None), *[("bucketed", size) for size in (0.0001, 0.001, 0.01, None)]],
)
def test_ddp(workers, world_size, name, bucket_size_mb):
    workers.run(check_ddp, world_size, name, bucket_size_mb)


class WithEmbedding(nn.Module):
    """Embedding, linear maps, and a norm between them."""

    def __init__(self):
        super().__init__()
        self.embedding, self.up = Embedding(11, 8), Linear(8, 24)
        self.norm, self.down = nn.LayerNorm(24), Linear(24, 11)

    def forward(self, ids):
        hidden = torch.relu(self.norm(self.up(self.embedding(ids)).float()))
        return self.down(hidden).float()


def check_fsdp(process, compute_dtype, optimizer_class, tolerance):
    torch.manual_seed(3)
    alone = WithEmbedding()
    together = adapters.get_fsdp(spoiled(process, alone), compute_dtype)
    optimizers = [optimizer_class(m.parameters(), lr=0.01) for m in (alone, together)]
    torch.manual_seed(4)
    for _ in range(4):
        ids, targets = torch.randint(11, (2, ROWS))
        for optimizer in optimizers:
            optimizer.zero_grad()
        nn.functional.cross_entropy(alone(ids), targets).backward()
        nn.functional.cross_entropy(together(part(process, ids)), part(process, targets)).backward()
        adapters.fsdp_on_after_backward(together, optimizers[1])
        for p in together.parameters():
            assert p.grad.shape == p.data.shape
            assert p.grad.dtype == p.data.dtype == torch.float32
        for optimizer in optimizers:
            optimizer.step()
    assert sum(p.numel() for p in together.parameters()) < 0.7 * sum(p.numel() for p in alone.parameters())
    assert_same(adapters.fsdp_gather_full_params(together), dict(alone.named_parameters()), tolerance)


@pytest.mark.parametrize("optimizer_class", [AdamW, torch.optim.SGD])
@pytest.mark.parametrize(("compute_dtype", "tolerance"), [(None, 1e-6), (torch.bfloat16, 0.03), (torch.float16, 0.03)])
def test_fsdp(workers, compute_dtype, tolerance, optimizer_class):
    workers.run(check_fsdp, 2, compute_dtype, optimizer_class, tolerance)


def check_sharded_optimizer(process, optimizer_class, options):
    problem = toy(torch.float32, ROWS)  # every process computes the whole gradient
    alone, ours = problem.model, copy.deepcopy(problem.model)
    optimizers = [
        optimizer_class(alone.parameters(), **options),
        adapters.get_sharded_optimizer(ours.parameters(), optimizer_class, **options),
    ]
    for inputs, targets in problem.batches:
        for model, optimizer in zip((alone, ours), optimizers):
            optimizer.zero_grad()
            problem.loss(model, inputs, targets).backward()
            optimizer.step()
    assert_same(dict(ours.named_parameters()), dict(alone.named_parameters()))


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize(
    ("optimizer_class", "options"),
    [
        (torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.1, "betas": (0.9, 0.999), "eps": 1e-8}),
        (AdamW, {"lr": 0.1}),
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    ],
)
def test_sharded_optimizer(workers, world_size, optimizer_class, options):
    workers.run(check_sharded_optimizer, world_size, optimizer_class, options)
