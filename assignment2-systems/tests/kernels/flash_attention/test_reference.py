"""FlashAttention-2 in plain PyTorch against the formula in float64."""

import subprocess
import sys

import pytest
import torch

from cs336_systems.kernels.flash_attention.reference import FlashAttentionPyTorch, flash_backward, flash_forward
from cs336_systems.kernels.flash_attention.shapes import check_inputs
from tests.reference_attention import (
    assert_errors_within,
    expected_results,
    plain_attention,
    random_inputs,
    relative_error,
    results,
    saved_logsumexp,
)

attend = FlashAttentionPyTorch.apply
LENGTHS = [(1, 1), (17, 17), (64, 64), (100, 100), (1, 100), (100, 1), (17, 100), (100, 17), (64, 128), (128, 64)]


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("d", [16, 32, 64, 128])
def test_results_and_gradients_equal_the_formula(d, lengths, is_causal):
    n_queries, n_keys = lengths
    inputs = random_inputs((2, n_queries, d), n_keys)
    assert_errors_within(results(attend, *inputs, is_causal), expected_results(*inputs, is_causal), 1e-5)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("leading", [(), (2,), (2, 3), (1, 1, 2), (0,)])
def test_any_leading_dimensions(leading, is_causal):
    inputs = random_inputs((*leading, 17, 16), 20)
    assert_errors_within(results(attend, *inputs, is_causal), expected_results(*inputs, is_causal), 1e-5)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 1e-3), (torch.bfloat16, 6e-3)])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("d", [16, 128])
def test_half_precision(d, is_causal, dtype, bound):
    inputs = random_inputs((2, 100, d), 130, dtype=dtype)
    ours, expected = results(attend, *inputs, is_causal), expected_results(*inputs, is_causal)
    assert_errors_within(ours, expected, bound)
    assert ours["L"].dtype == torch.float32
    assert relative_error(ours["L"], expected["L"]) <= 1e-6  # no rounding to half precision on the way


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("tiles", [(16, 16), (16, 64), (64, 16), (32, 48), (1, 1), (5, 3), (256, 256)])
def test_tiles_change_nothing(tiles, is_causal):
    for lengths in ((50, 50), (20, 50), (50, 20)):
        Q, K, V, dO = random_inputs((1, lengths[0], 16), lengths[1], dtype=torch.float64)
        O, L = flash_forward(Q, K, V, is_causal, *tiles)
        gradients = flash_backward(Q, K, V, O, L, dO, is_causal, *tiles)
        ours = dict(zip(("O", "L", "dQ", "dK", "dV"), (O, L, *gradients)))
        assert_errors_within(ours, expected_results(Q, K, V, dO, is_causal), 1e-13)


def test_tiles_above_the_diagonal_are_skipped():
    """Keys and values there may even be NaN."""
    Q, K, V, dO = random_inputs((64, 16), 128)
    K[64:], V[64:] = torch.nan, torch.nan
    O, L = flash_forward(Q, K, V, True, 32, 32)
    dQ, dK, dV = flash_backward(Q, K, V, O, L, dO, True, 32, 32)
    assert all(torch.isfinite(tensor).all() for tensor in (O, L, dQ, dK, dV))
    assert not dK[64:].any()
    assert not dV[64:].any()


def test_noncontiguous_inputs_and_an_expanded_gradient():
    heads_last = [torch.randn(2, 40, 3, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    Q, K, V = (tensor.transpose(1, 2) for tensor in heads_last)
    V = V.flip(-1).mT.contiguous().mT  # d is not the innermost dimension
    dO = torch.ones(()).expand(Q.shape)
    assert_errors_within(results(attend, Q, K, V, dO, True), expected_results(Q, K, V, dO, True), 1e-5)
    shared = K[:, :1].expand(K.shape)
    assert_errors_within(results(attend, Q, shared, V, dO), expected_results(Q, shared, V, dO), 1e-5)


@pytest.mark.parametrize("is_causal", [False, True])
def test_gradcheck(is_causal):
    for n_queries, n_keys in ((5, 5), (3, 7), (7, 3)):
        inputs = [tensor.requires_grad_() for tensor in random_inputs((2, n_queries, 4), n_keys, dtype=torch.float64)]
        torch.autograd.gradcheck(lambda Q, K, V: attend(Q, K, V, is_causal), inputs[:3])


def test_second_derivatives_are_refused():
    """Also with a dO that does not depend on Q, where an untry_measure backward pass would return constants."""
    Q = torch.randn(3, 4, requires_grad=True)
    O = attend(Q, Q, Q)
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(O, Q, torch.ones_like(O), create_graph=True)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_keys_or_queries(dtype, is_causal):
    inputs = random_inputs((2, 17, 16), 0, dtype=dtype)
    ours = results(attend, *inputs, is_causal)
    assert not ours["O"].any()
    assert (ours["L"] == -torch.inf).all()
    assert not ours["dQ"].any()
    ours = results(attend, *random_inputs((2, 0, 16), 17, dtype=dtype), is_causal)
    assert not ours["dK"].any()
    assert not ours["dV"].any()


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_huge_scores(dtype, is_causal):
    Q, K, V, dO = random_inputs((1, 100, 16), 100, dtype=dtype)
    Q, K = 100 * Q, 100 * K
    ours = results(attend, Q, K, V, dO, is_causal)
    assert ours["L"].abs().max() > 1e4
    assert all(torch.isfinite(tensor).all() for tensor in ours.values())
    O, L = plain_attention(Q, K, V, is_causal)
    assert relative_error(ours["O"], O) <= 1e-2
    assert relative_error(ours["L"], L) <= 1e-5


def test_what_is_saved():
    Q, K, V, _ = (tensor.requires_grad_() for tensor in random_inputs((3, 20, 16), 30))
    O = attend(Q, K, V)
    assert O.grad_fn.is_causal is False
    assert sorted(tensor.shape for tensor in O.grad_fn.saved_tensors) == sorted(
        [Q.shape, K.shape, V.shape, O.shape, (3, 20)]
    )
    torch.testing.assert_close(saved_logsumexp(O), plain_attention(Q, K, V)[1].float())
    assert attend(Q, K, V, True).grad_fn.is_causal is True


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 2)])
def test_gradients_of_some_inputs_only(needed):
    inputs = random_inputs((1, 20, 16), 20)
    expected = results(attend, *inputs)
    leaves = [tensor.clone().requires_grad_(index in needed) for index, tensor in enumerate(inputs[:3])]
    attend(*leaves).backward(inputs[3])
    for index, name in enumerate(("dQ", "dK", "dV")):
        assert (leaves[index].grad is not None) == (index in needed)
        if index in needed:
            assert torch.equal(leaves[index].grad, expected[name])


def test_autocast_does_not_reach_inside():
    inputs = random_inputs((1, 40, 16), 40)
    expected = results(attend, *inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = results(attend, *inputs)
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_compiles_as_one_graph():
    """In a process of its own: here the package's functions are wrapped in type checks, which break the graph."""
    program = """
import torch
from cs336_systems.kernels.flash_attention.reference import FlashAttentionPyTorch

for is_causal in (False, True):
    compiled = torch.compile(FlashAttentionPyTorch.apply, backend="aot_eager", fullgraph=True)
    inputs = [torch.randn(2, 70, 16, requires_grad=True) for _ in range(3)]
    arguments = (*inputs, True) if is_causal else inputs
    O, expected = compiled(*arguments), FlashAttentionPyTorch.apply(*arguments)
    torch.testing.assert_close(O, expected)
    dO = torch.randn_like(O)
    for ours, theirs in zip(torch.autograd.grad(O, inputs, dO), torch.autograd.grad(expected, inputs, dO)):
        torch.testing.assert_close(ours, theirs)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def shaped(*shape, **kwargs):
    return torch.zeros(shape, **kwargs)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((shaped(16), shaped(3, 16), shaped(3, 16)), r"Q has shape \(16,\).*unsqueeze"),
        ((shaped(3, 16), shaped(3, 16), shaped(3, 16, dtype=torch.int64)), r"V is torch\.int64.*cast"),
        ((shaped(3, 16), shaped(3, 16).half(), shaped(3, 16)), r"float32, torch\.float16 and torch\.float32: cast"),
        ((shaped(3, 16), shaped(3, 16, device="meta"), shaped(3, 16)), r"cpu, meta and cpu: move"),
        ((shaped(3, 16), shaped(3, 16), shaped(3, 32)), r"16, 16 and 32"),
        ((shaped(3, 0), shaped(3, 0), shaped(3, 0)), r"at least 1"),
        ((shaped(3, 16), shaped(5, 16), shaped(4, 16)), r"5 keys, but V has 4"),
        ((shaped(2, 3, 16), shaped(1, 3, 16), shaped(2, 3, 16)), r"\(2,\), \(1,\) and \(2,\).*expand"),
        ((shaped(2, 3, 16), shaped(3, 16), shaped(3, 16)), r"\(2,\), \(\) and \(\)"),
    ],
)
def test_wrong_inputs_are_named(inputs, message):
    with pytest.raises(ValueError, match=message):
        check_inputs(*inputs)
    with pytest.raises(ValueError, match=message):
        attend(*inputs)
