"""Softmax, loss and clipping against PyTorch's own, in float64 and at the extremes."""

import pytest
import torch
from torch.nn import functional as F

from cs336_basics.nn_utils import clip_gradient, cross_entropy, log_softmax, silu, softmax, squared_relu

SHAPES = [(1, 1), (3, 7), (2, 3, 17), (1, 2, 3, 129)]


@pytest.mark.parametrize("shape", SHAPES)
def test_activations_and_softmax_equal_torch(shape):
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 10
    torch.testing.assert_close(silu(x), F.silu(x), rtol=0, atol=1e-14)
    torch.testing.assert_close(squared_relu(x), F.relu(x) ** 2, rtol=0, atol=1e-14)
    for dim in range(len(shape)):
        torch.testing.assert_close(softmax(x, dim), F.softmax(x, dim), rtol=0, atol=1e-15)
        torch.testing.assert_close(log_softmax(x, dim), F.log_softmax(x, dim), rtol=0, atol=1e-13)


@pytest.mark.parametrize("offset", [0.0, 1000.0, -1000.0, 1e30])
def test_softmax_does_not_depend_on_an_offset(offset):
    x = torch.tensor([1.0, 2.0, 4.0])
    expected = softmax(x if abs(offset) < 1e8 else torch.zeros(3))
    torch.testing.assert_close(softmax(x + offset), expected, rtol=1e-3, atol=1e-3)
    assert torch.isfinite(log_softmax(x + offset)).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_cross_entropy_and_its_gradient_equal_torch(shape):
    rng = torch.Generator().manual_seed(1)
    logits = (torch.randn(shape, dtype=torch.float64, generator=rng) * 5).requires_grad_()
    targets = torch.randint(shape[-1], shape[:-1], generator=rng)
    ours = cross_entropy(logits, targets)
    expected = F.cross_entropy(logits.flatten(0, -2), targets.flatten())
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-13)
    (gradient,) = torch.autograd.grad(ours, logits, retain_graph=True)
    (expected_gradient,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-14)


def test_cross_entropy_at_huge_logits():
    logits = torch.tensor([[1000.0, -1000.0], [-1000.0, 1000.0]])
    assert cross_entropy(logits, torch.tensor([0, 1])).item() == 0
    assert cross_entropy(logits, torch.tensor([1, 0])).item() == 2000


def test_cross_entropy_of_half_precision_is_summed_in_float32():
    logits = torch.zeros(1, 50_000, dtype=torch.bfloat16)
    loss = cross_entropy(logits, torch.tensor([3]))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, torch.tensor(50_000.0).log())


@pytest.mark.parametrize("max_norm", [1e-3, 1.0, 1e6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_clipping_equals_torch(max_norm, dtype):
    def parameters():
        rng = torch.Generator().manual_seed(2)
        made = [torch.nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in ((3, 5), (7,), (1,), (2, 2))]
        for parameter in made[:-1]:  # the last one has no gradient
            parameter.grad = torch.randn(parameter.shape, dtype=dtype, generator=rng)
        return made

    ours, theirs = parameters(), parameters()
    norm = clip_gradient(iter(ours), max_norm)
    expected = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    torch.testing.assert_close(norm, expected)
    for one, other in zip(ours[:-1], theirs[:-1]):
        torch.testing.assert_close(one.grad, other.grad)
    assert ours[-1].grad is None


def test_clipping_nothing():
    assert clip_gradient([torch.nn.Parameter(torch.zeros(2))], 1.0) == 0


@pytest.mark.parametrize("function", [softmax, log_softmax, lambda x: cross_entropy(x, torch.tensor([0, 1]))])
def test_no_gradient_flows_through_the_maximum(function):
    """It would cancel in exact arithmetic, but became NaN in a compiled bfloat16 model on a GPU."""
    nodes = [function(torch.randn(2, 3, requires_grad=True)).grad_fn]
    seen = set()
    while nodes:
        node = nodes.pop()
        seen.add(node.name())
        nodes += [after for after, _ in node.next_functions if after]
    assert any("Exp" in name for name in seen)
    assert not any("max" in name.lower() for name in seen)
