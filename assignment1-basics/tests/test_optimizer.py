"""AdamW and the schedule against PyTorch's own and against the formulas."""

import copy
import math
from itertools import accumulate

import pytest
import torch

from cs336_basics.optimizer import AdamW, get_cosine_lr, get_trapezoid_lr


def train(optimizer_class, dtype, steps=1000, **options):
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2)).to(dtype)
    optimizer = optimizer_class(model.parameters(), **options)
    for _ in range(steps):
        x = torch.rand(4, 3, dtype=dtype)
        ((model(x) - x[:, :2].sin()) ** 2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_adamw_stays_with_torch_for_1000_steps(weight_decay, dtype):
    options = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": weight_decay}
    ours, theirs = train(AdamW, dtype, **options), train(torch.optim.AdamW, dtype, **options)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_adamw_is_the_algorithm_of_the_paper():
    parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    optimizer = AdamW([parameter], lr=0.1, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.2)
    theta, m, v = parameter.detach().clone(), torch.zeros(2), torch.zeros(2)
    for t, gradient in enumerate(([0.5, -1.0], [2.0, 0.0], [-0.1, 3.0]), start=1):
        g = parameter.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g**2
        theta = theta - 0.1 * math.sqrt(1 - 0.9**t) / (1 - 0.8**t) * m / (v.sqrt() + 1e-3)
        theta = theta - 0.1 * 0.2 * theta
        torch.testing.assert_close(parameter.detach(), theta, rtol=1e-14, atol=0)


def test_groups_and_missing_gradients():
    first, second, idle = (torch.nn.Parameter(torch.ones(2)) for _ in range(3))
    optimizer = AdamW([{"params": [first, idle]}, {"params": [second], "lr": 0.0}], lr=0.1)
    for step in range(3):
        first.grad, second.grad = torch.ones(2), torch.ones(2)
        idle.grad = torch.ones(2) if step == 2 else None  # its own count of steps begins here
        optimizer.step()
    assert (first < 0.8).all()
    assert (second == 1).all()
    torch.testing.assert_close(idle.detach(), torch.full((2,), (1 - 0.1) * (1 - 0.1 * 0.01)), rtol=1e-6, atol=0)


def test_state_survives_saving_and_loading():
    torch.manual_seed(0)
    one = torch.nn.Parameter(torch.randn(4))
    optimizer = AdamW([one], lr=0.1)
    one.grad = torch.randn(4)
    optimizer.step()
    two = torch.nn.Parameter(one.detach().clone())
    restored = AdamW([two], lr=1.0)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    one.grad = two.grad = torch.randn(4)
    optimizer.step()
    restored.step()
    assert torch.equal(one, two)


def test_closure_is_called_with_gradients():
    parameter = torch.nn.Parameter(torch.tensor(2.0))
    optimizer = AdamW([parameter], lr=0.1)

    def closure():
        loss = parameter**2
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 4.0
    assert parameter.item() < 2.0


@pytest.mark.parametrize("options", [{"lr": -1.0}, {"betas": (1.0, 0.9)}, {"eps": -1.0}, {"weight_decay": -0.1}])
def test_impossible_options_are_refused(options):
    with pytest.raises(ValueError, match="must"):
        AdamW([torch.nn.Parameter(torch.zeros(1))], **options)


@pytest.mark.parametrize(("warmup", "cycle"), [(7, 21), (0, 10), (5, 5), (1, 1000)])
def test_schedule_equals_torchs(warmup, cycle):
    high, low = 1.0, 0.1
    parameter = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    for it in range(cycle + 5):
        if it < warmup:
            expected = high * it / warmup
        elif it < cycle:
            reference = torch.optim.lr_scheduler.CosineAnnealingLR(
                torch.optim.SGD([parameter], lr=high), T_max=cycle - warmup, eta_min=low
            )
            expected = reference._get_closed_form_lr()[0] if it == warmup else _closed_form(reference, it - warmup)
        else:
            expected = low
        assert get_cosine_lr(it, high, low, warmup, cycle) == pytest.approx(expected, abs=1e-12)


def _closed_form(scheduler, epoch):
    scheduler.last_epoch = epoch
    return scheduler._get_closed_form_lr()[0]


@pytest.mark.parametrize(("warmup", "decay", "total"), [(10, 30, 100), (0, 100, 100), (5, 95, 100), (7, 1, 20)])
def test_trapezoid_equals_torchs(warmup, decay, total):
    low, high = 0.02, 0.5
    parts = torch.optim.lr_scheduler
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=high)
    phases = [
        (warmup, lambda: parts.LambdaLR(optimizer, lambda it: it / warmup)),
        (total - decay - warmup, lambda: parts.ConstantLR(optimizer, factor=1.0)),
        (decay, lambda: parts.LinearLR(optimizer, 1.0, low / high, total_iters=decay)),
    ]
    phases = [(steps, phase) for steps, phase in phases if steps]  # torch wants no empty ones
    milestones = list(accumulate(steps for steps, _ in phases))[:-1]
    schedule = parts.SequentialLR(optimizer, [phase() for _, phase in phases], milestones)
    for it in range(total + 5):
        assert get_trapezoid_lr(it, high, low, warmup, decay, total) == pytest.approx(
            optimizer.param_groups[0]["lr"], abs=1e-12
        ), it
        optimizer.step()
        schedule.step()
