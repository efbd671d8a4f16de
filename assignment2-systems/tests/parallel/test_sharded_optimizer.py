"""Each process updates its share, and the parameters are those of the unsharded optimizer, bit by bit."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from cs336_basics.optimizer import AdamW
from cs336_systems.parallel import BucketedDataParallel, ShardedOptimizer
from cs336_systems.parallel.sharded_optimizer import merge_state_dicts
from tests.toy_models import assert_same, language, parameters_of, toy, train_alone, train_together

OPTIMIZERS = {
    "momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
    "Adam": partial(torch.optim.Adam, lr=0.01, amsgrad=True),
    "torch's AdamW": partial(torch.optim.AdamW, lr=0.01),
    "our AdamW": partial(AdamW, lr=0.01),
    "Adagrad": partial(torch.optim.Adagrad, lr=0.1),
}
optimizers = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
STEPS = 6


def sharded(make, params):
    return ShardedOptimizer(params, make.func, **make.keywords)


def make_model():
    torch.manual_seed(2)
    return toy(torch.float32, 1).model


def groups_of(model):
    """Norms learn faster, and the rest as the defaults have it."""
    norms = list(model.norm.parameters())
    rest = [p for p in model.parameters() if not any(p is norm for norm in norms)]
    return [{"params": rest}, {"params": norms, "lr": 0.2, "weight_decay": 0.0}]


def set_gradients(model, step):
    """Those that all processes have after averaging. The unused parameter has none."""
    torch.manual_seed(step)
    for name, p in model.named_parameters():
        p.grad = torch.randn_like(p) if p.requires_grad and "unused" not in name else None


def train(model, optimizer, steps):
    for step in steps:
        set_gradients(model, step)
        optimizer.step()
    return parameters_of(model)


def check_steps(process, make):
    expected = train(alone := make_model(), make(groups_of(alone)), range(STEPS))
    ours = train(model := make_model(), sharded(make, groups_of(model)), range(STEPS))
    assert_same(ours, expected)


@optimizers
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_equals_the_unsharded_optimizer(workers, world_size, make):
    workers.run(check_steps, world_size, make)


def check_with_data_parallelism(process, make):
    problem = toy(torch.float64, rows=2 * process.world_size)
    alone = train_alone(problem, make)
    together = train_together(process, problem, BucketedDataParallel, partial(sharded, make))
    for ours, theirs in zip(together, alone, strict=True):
        assert_same(ours, theirs, 1e-10)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("name", ["our AdamW", "torch's AdamW", "momentum"])
def test_with_data_parallelism_equals_one_process(workers, world_size, name):
    workers.run(check_with_data_parallelism, world_size, OPTIMIZERS[name])


def elements_of_state(process):
    """In this process, and of the unsharded optimizer."""
    model = language(torch.float32, 1).model
    optimizers = sharded(OPTIMIZERS["our AdamW"], model.parameters()), AdamW(model.parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    counts = []
    for optimizer in optimizers:
        optimizer.step()
        states = (optimizer.inner if isinstance(optimizer, ShardedOptimizer) else optimizer).state.values()
        counts.append(sum(x.numel() for state in states for x in state.values() if torch.is_tensor(x)))
    return counts


@pytest.mark.parametrize("world_size", [2, 3])
def test_state_is_shared_out_evenly(workers, world_size):
    ours, (whole, *_) = zip(*workers.run(elements_of_state, world_size))
    assert sum(ours) == whole
    assert max(ours) < 1.05 * whole / world_size


def check_nothing_owned(process):
    parameter = nn.Parameter(torch.ones(3))
    optimizer = ShardedOptimizer([parameter], torch.optim.AdamW, lr=0.1)
    parameter.grad = torch.ones(3)
    optimizer.step()
    torch.testing.assert_close(parameter.detach(), torch.full((3,), 1 - 0.1 * 0.01 - 0.1))
    optimizer.load_state_dict(optimizer.state_dict())
    return len(optimizer.inner.state)


def test_processes_without_a_parameter(workers):
    assert workers.run(check_nothing_owned, 3) == [1, 0, 0]


def check_added_group(process, make):
    models = make_model(), make_model()
    for model, wrap in zip(models, (make, partial(sharded, make))):
        norms, rest = list(model.norm.parameters()), [p for n, p in model.named_parameters() if "norm" not in n]
        optimizer = wrap(rest)
        train(model, optimizer, range(3))
        optimizer.add_param_group({"params": norms, "lr": 0.3})
        assert len(optimizer.param_groups) == 2
        train(model, optimizer, range(3, 6))
    assert_same(parameters_of(models[1]), parameters_of(models[0]))


@optimizers
def test_a_group_added_later(workers, make):
    if make.func is torch.optim.Adagrad and torch.__version__ < "2.11":
        pytest.skip("Adagrad of PyTorch 2.10 does not take a group after its first step")
    workers.run(check_added_group, 2, make)


def check_schedule(process, make):
    models = make_model(), make_model()
    for model, wrap in zip(models, (make, partial(sharded, make))):
        optimizer = wrap(groups_of(model))
        schedule = LambdaLR(optimizer, lambda step: 1 / (1 + step))
        for step in range(STEPS):
            train(model, optimizer, [step])
            schedule.step()
    assert_same(parameters_of(models[1]), parameters_of(models[0]))


@optimizers
def test_a_learning_rate_schedule(workers, make):
    workers.run(check_schedule, 2, make)


def check_closure(process):
    parameter = nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = ShardedOptimizer([parameter], torch.optim.SGD, lr=0.5)
    calls = []

    def closure():
        calls.append(parameter.tolist())
        optimizer.zero_grad()
        loss = parameter.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 25
    assert optimizer.step(closure).item() == 0
    assert calls == [[3, 4], [0, 0]]


def test_a_closure_runs_once(workers):
    workers.run(check_closure, 2)


def check_zero_grad(process):
    model = make_model()
    optimizer = sharded(OPTIMIZERS["momentum"], model.parameters())
    set_gradients(model, 0)
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_zero_grad_is_for_all_parameters(workers):
    workers.run(check_zero_grad, 2)


# --- saving and resuming ---


def first_half(process, make):
    """Train, and give what a checkpoint holds. Learning rates are not those of the start."""
    optimizer = sharded(make, groups_of(model := make_model()))
    optimizer.param_groups[0]["lr"] = 0.05
    train(model, optimizer, range(3))
    return model.state_dict(), optimizer.state_dict()


def second_half(process, make, weights, states):
    """Go on from one state for all, or from a state for each."""
    optimizer = sharded(make, groups_of(model := make_model()))
    model.load_state_dict(weights)
    optimizer.load_state_dict(states[process.rank] if isinstance(states, list) else states)
    return train(model, optimizer, range(3, STEPS))


def uninterrupted(make):
    optimizer = make(groups_of(model := make_model()))
    optimizer.param_groups[0]["lr"] = 0.05
    return train(model, optimizer, range(STEPS))


@optimizers
@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 1), (2, 2)])
def test_resuming_with_another_number_of_processes(workers, make, before, after):
    weights, shares = zip(*workers.run(first_half, before, make))
    merged = merge_state_dicts(shares)
    for result in workers.run(second_half, after, make, weights[0], merged):
        assert_same(result, uninterrupted(make))


@optimizers
def test_resuming_each_from_its_own_share(workers, make):
    weights, shares = zip(*workers.run(first_half, 2, make))
    for result in workers.run(second_half, 2, make, weights[0], list(shares)):
        assert_same(result, uninterrupted(make))


@optimizers
def test_merged_shares_are_the_unsharded_state(workers, make):
    weights, shares = zip(*workers.run(first_half, 2, make))
    optimizer = make(groups_of(model := make_model()))
    model.load_state_dict(weights[0])
    optimizer.load_state_dict(merge_state_dicts(shares))
    assert_same(train(model, optimizer, range(3, STEPS)), uninterrupted(make))


@optimizers
def test_resuming_from_the_unsharded_state(workers, make):
    optimizer = make(groups_of(model := make_model()))
    optimizer.param_groups[0]["lr"] = 0.05
    train(model, optimizer, range(3))
    for result in workers.run(second_half, 3, make, model.state_dict(), optimizer.state_dict()):
        assert_same(result, uninterrupted(make))


def check_wrong_shares(process, make, shares):
    optimizer = sharded(make, groups_of(make_model()))
    with pytest.raises(ValueError, match="share of another rank, or of another number of ranks: merge all shares"):
        optimizer.load_state_dict(shares[1 - process.rank])
    with pytest.raises(ValueError, match="groups"):
        ShardedOptimizer(make_model().parameters(), make.func, **make.keywords).load_state_dict(shares[process.rank])


def test_the_share_of_another_process_is_refused(workers):
    make = OPTIMIZERS["our AdamW"]
    _, shares = zip(*workers.run(first_half, 2, make))
    workers.run(check_wrong_shares, 2, make, shares)
    with pytest.raises(ValueError, match="give the shares of all ranks"):
        merge_state_dicts(shares[:1])
    with pytest.raises(ValueError, match="give the shares of all ranks"):
        merge_state_dicts([shares[0], shares[0]])


def check_arguments(process):
    with pytest.raises(ValueError, match="empty parameter list"):
        ShardedOptimizer([], torch.optim.SGD, lr=0.1)
    with pytest.raises(ValueError, match="learning rate"):
        ShardedOptimizer([nn.Parameter(torch.ones(1))], torch.optim.SGD, lr=-1.0)
    assert isinstance(ShardedOptimizer([nn.Parameter(torch.ones(1))], AdamW), torch.optim.Optimizer)


def test_the_optimizer_checks_its_arguments(workers):
    workers.run(check_arguments, 2)
