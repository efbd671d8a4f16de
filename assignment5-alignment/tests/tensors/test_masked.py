"""Masked means and sums against loops over the entries that count."""

import math

import pytest
import torch

from cs336_alignment.tensors.masked import masked_mean, masked_normalize

SHAPES = [(1,), (5,), (2, 7), (3, 1), (2, 3, 4)]


def slices(tensor, dim):
    """Return the vectors that a reduction over `dim` reduces, and the shape of its result."""
    if dim is None:
        return tensor.reshape(1, -1), ()
    moved = tensor.movedim(dim, -1)
    return moved.reshape(-1, moved.shape[-1]), moved.shape[:-1]


def looped(tensor, mask, dim, reduce):
    """`reduce` of the list of numbers that count, for every vector."""
    vectors, shape = slices(tensor.double(), dim)
    masks, _ = slices(mask, dim)
    rows = [[value for value, kept in zip(v.tolist(), m.tolist()) if kept] for v, m in zip(vectors, masks)]
    return torch.tensor([reduce(row) for row in rows], dtype=torch.float64).view(shape)


def mean(numbers):
    return math.fsum(numbers) / len(numbers) if numbers else math.nan


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)]
)
def test_against_loops(shape, dtype, tolerance):
    rng = torch.Generator().manual_seed(0)
    tensor = torch.randn(shape, generator=rng).to(dtype)
    for density in (0.0, 0.5, 1.0):
        mask = torch.rand(shape, generator=rng) < density
        for dim in (None, *range(-len(shape), len(shape))):
            ours = masked_mean(tensor, mask, dim)
            assert ours.dtype == dtype
            close = {"rtol": tolerance, "atol": tolerance, "equal_nan": True}
            torch.testing.assert_close(ours.double(), looped(tensor, mask, dim, mean), **close)
            ours = masked_normalize(tensor, mask, dim, 3.5)
            expected = looped(tensor, mask, dim, lambda numbers: math.fsum(numbers) / 3.5)
            torch.testing.assert_close(ours.double(), expected, **close)


@pytest.mark.parametrize("dim", [None, 0, 1, -1])
def test_with_everything_masked_in_they_are_those_of_torch(dim):
    tensor = torch.randn(4, 6, dtype=torch.float64)
    everything = torch.ones(4, 6, dtype=torch.bool)
    torch.testing.assert_close(masked_mean(tensor, everything, dim), tensor.mean(dim))
    torch.testing.assert_close(masked_normalize(tensor, everything, dim), tensor.sum(dim))


def test_a_row_without_entries_has_no_mean():
    tensor, mask = torch.ones(2, 3), torch.tensor([[False] * 3, [True] * 3])
    assert masked_mean(tensor, mask, 1).isnan().tolist() == [True, False]
    assert masked_normalize(tensor, mask, 1).tolist() == [0, 3]
    assert masked_mean(tensor, torch.zeros(2, 3, dtype=torch.bool)).isnan()


def test_a_mask_may_be_of_numbers():
    tensor = torch.arange(6.0).view(2, 3)
    mask = torch.tensor([[1, 0, 1], [0, 1, 1]])
    for kind in (mask, mask.float(), mask.bool()):
        assert masked_mean(tensor, kind, 1).tolist() == [1.0, 4.5]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_masked_out_has_no_influence(bad):
    tensor = torch.tensor([[1.0, bad], [3.0, 4.0]], requires_grad=True)
    mask = torch.tensor([[True, False], [True, True]])
    result = masked_mean(tensor, mask, 1).sum() + masked_normalize(tensor, mask, normalize_constant=2.0)
    assert result.item() == 1 + 3.5 + 4
    (gradient,) = torch.autograd.grad(result, tensor)
    assert gradient.tolist() == [[1.5, 0.0], [1.0, 1.0]]


@pytest.mark.parametrize("dim", [None, 0, 1])
def test_gradients_against_finite_differences(dim):
    rng = torch.Generator().manual_seed(1)
    tensor = torch.randn(3, 5, dtype=torch.float64, generator=rng, requires_grad=True)
    mask = torch.rand(3, 5, generator=rng) < 0.7
    mask[0] = True  # every row and column has an entry
    mask[:, 0] = True
    assert torch.autograd.gradcheck(lambda t: masked_mean(t, mask, dim), tensor)
    assert torch.autograd.gradcheck(lambda t: masked_normalize(t, mask, dim, 7.0), tensor)
