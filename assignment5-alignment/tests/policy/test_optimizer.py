"""One update of a model."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cs336_alignment.policy.config import OptimizerConfig
from cs336_alignment.policy.optimizer import DivergedError, PolicyOptimizer, split_into_microbatches

INPUTS, TARGETS = torch.randn(12, 3, generator=torch.Generator().manual_seed(1)), torch.arange(12.0)


def update(optimizer, microbatches, lr, scale=1.0):
    """Update with the mean squared error, split over microbatches, and return the metrics."""
    with optimizer.accumulate(lr) as gradients:
        for indices in microbatches:
            errors = (optimizer.model(INPUTS[indices])[:, 0] - TARGETS[indices]).square()
            loss = scale * errors.sum() / len(INPUTS)
            gradients.backward(loss, largest=errors.detach().sum() / len(INPUTS))
    return gradients.metrics


@pytest.mark.parametrize("config", [
    OptimizerConfig(gradient_accumulation_steps=1),
    OptimizerConfig(gradient_accumulation_steps=4),
    OptimizerConfig(gradient_accumulation_steps=12, max_grad_norm=math.inf),
    OptimizerConfig(microbatch_tokens=20, weight_decay=0.1, betas=(0.8, 0.9), eps=1e-3),
])  # fmt: skip
def test_updates_are_those_of_the_whole_batch(config):
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    reference = copy.deepcopy(model)
    torchs = torch.optim.AdamW(
        reference.parameters(), betas=config.betas, eps=config.eps, weight_decay=config.weight_decay
    )
    ours = PolicyOptimizer(model, config)
    for lr in (0.1, 0.05, 0.2):
        metrics = update(ours, split_into_microbatches(range(1, 13), config, 12), lr)
        torchs.zero_grad()
        loss = F.mse_loss(reference(INPUTS)[:, 0], TARGETS)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(reference.parameters(), config.max_grad_norm)
        torchs.param_groups[0]["lr"] = lr
        torchs.step()
        expected = {"loss": loss.item(), "largest": loss.item(), "grad_norm": norm.item(), "lr": lr}
        assert metrics == pytest.approx(expected, rel=1e-5)
        for mine, theirs in zip(model.parameters(), reference.parameters()):
            torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-6)
            assert mine.grad is None


def test_rmsprop():
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    before = model.weight.clone()
    update(PolicyOptimizer(model, OptimizerConfig(algorithm="rmsprop")), [list(range(12))], 1e-3)
    # the first step of RMSprop with decay 0.99 is lr · g / sqrt(0.01 g²)
    torch.testing.assert_close((model.weight - before).abs(), torch.full((1, 3), 1e-2), atol=1e-6, rtol=0)


@pytest.mark.parametrize("scale", [math.nan, math.inf])
def test_divergence_updates_nothing(scale):
    model = nn.Linear(3, 1)
    before = copy.deepcopy(model.state_dict())
    optimizer = PolicyOptimizer(model, OptimizerConfig())
    with pytest.raises(DivergedError, match=f"the loss is {scale}, the norm of the gradient {scale}"):
        update(optimizer, [[0, 1], [2]], 0.1, scale)
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    assert not optimizer.optimizer.state
    update(optimizer, [[0, 1], [2]], 0.1)  # no gradient is left over
    assert all(weight.isfinite().all() for weight in model.parameters())


def test_short_batches_have_fewer_microbatches_of_the_same_size():
    config = OptimizerConfig(gradient_accumulation_steps=4)
    assert split_into_microbatches([9] * 8, config, 8) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert split_into_microbatches([9] * 3, config, 8) == [[0, 1], [2]]
    assert split_into_microbatches([5, 10, 10, 1], OptimizerConfig(microbatch_tokens=20), 8) == [[1, 2], [0, 3]]


def test_learning_rates():
    constant = OptimizerConfig(lr=2.0)
    assert [constant.lr_at(step, 4) for step in (1, 4)] == [2.0, 2.0]
    cosine = OptimizerConfig(lr=2.0, schedule="cosine", warmup_ratio=0.2)
    rates = [cosine.lr_at(step, 10) for step in range(1, 11)]
    assert rates[:3] == [1.0, 2.0, 2.0]
    assert rates[6] == pytest.approx(1.0)  # half of the wave's eight updates
    assert sorted(rates[2:], reverse=True) == rates[2:]
    assert 0 < rates[-1] < 0.1
    assert OptimizerConfig(lr=2.0, warmup_ratio=1.0).lr_at(1, 1) == 2.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": -1.0}, "lr is -1.0, but must not be negative"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0"),
        ({"eps": -1.0}, "eps is -1.0"),
        ({"warmup_ratio": 1.5}, "warmup_ratio is 1.5, but must be between 0 and 1"),
        ({"max_grad_norm": 0.0}, "max_grad_norm is 0.0, but must be positive; inf turns clipping off"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps is 0, but must be at least 1"),
        ({"microbatch_tokens": 0}, "microbatch_tokens is 0, but must be at least 1"),
    ],
)
def test_impossible_configurations_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**change)


def test_batches_must_split_only_where_microbatches_are_counted():
    with pytest.raises(ValueError, match="train_batch_size 6 must be a multiple of gradient_accumulation_steps 4"):
        OptimizerConfig(gradient_accumulation_steps=4).check_batch_size("train_batch_size", 6)
    OptimizerConfig(gradient_accumulation_steps=4, microbatch_tokens=100).check_batch_size("train_batch_size", 6)
