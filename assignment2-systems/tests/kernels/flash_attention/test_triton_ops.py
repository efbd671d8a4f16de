"""The Triton kernels against the formula in float64: in Triton's interpreter, or on a GPU if there is one.

The interpreter is slow and its `tl.dot` wrong for bfloat16: shapes are small, and `test_gpu.py` does the rest.
"""

import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.utils.checkpoint
from triton.runtime.errors import OutOfResources

from cs336_systems.kernels import triton_support
from cs336_systems.kernels.flash_attention import FlashAttentionTriton, flash_attention, triton_ops
from tests.reference_attention import (
    assert_errors_within,
    expected_results,
    plain_attention,
    random_inputs,
    relative_error,
    results,
    saved_logsumexp,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
attend = FlashAttentionTriton.apply


def inputs_of(shape, n_keys, dtype=torch.float32, seed=0):
    return random_inputs(shape, n_keys, dtype=dtype, device=DEVICE, seed=seed)


def test_the_interpreter_is_on_where_there_is_no_gpu():
    assert (DEVICE == "cpu") == triton_support.INTERPRETED


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("lengths", [(1, 1), (17, 17), (100, 100), (17, 100), (100, 17), (1, 100), (100, 1), (64, 128)])
def test_any_lengths(lengths, is_causal):
    inputs = inputs_of((2, lengths[0], 16), lengths[1])
    assert_errors_within(results(attend, *inputs, is_causal), expected_results(*inputs, is_causal), 1e-5)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float16, 1e-3)])
@pytest.mark.parametrize("d", [16, 32, 64, 128])
def test_widths_and_dtypes(d, dtype, bound, is_causal):
    inputs = inputs_of((1, 70, d), 140, dtype)
    ours, expected = results(attend, *inputs, is_causal), expected_results(*inputs, is_causal)
    assert_errors_within(ours, expected, bound)
    assert ours["L"].dtype == torch.float32
    assert relative_error(ours["L"], expected["L"]) <= 1e-5


@pytest.mark.parametrize("d", [1, 8, 20, 48, 100])
def test_widths_between(d):
    """Those that the kernels pad to a power of two."""
    for dtype, bound in ((torch.float32, 1e-5), (torch.float16, 1e-3)):
        inputs = inputs_of((1, 20, d), 25, dtype)
        assert_errors_within(results(attend, *inputs, True), expected_results(*inputs, True), bound)


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (1, 2, 2)])
def test_any_leading_dimensions(leading):
    inputs = inputs_of((*leading, 17, 16), 20)
    assert_errors_within(results(attend, *inputs, True), expected_results(*inputs, True), 1e-5)


def test_transposed_inputs():
    """Heads next to the width, as a projection leaves them; and a V whose width is not the innermost dimension."""
    Q, dO = (inputs_of((2, 40, 3, 16), 3, seed=seed)[0].transpose(1, 2) for seed in (0, 1))
    K, V = (inputs_of((2, 50, 3, 16), 3, seed=seed)[0].transpose(1, 2) for seed in (2, 3))
    V = V.mT.contiguous().mT
    assert not any(tensor.is_contiguous() for tensor in (Q, K, V, dO))
    assert_errors_within(results(attend, Q, K, V, dO, True), expected_results(Q, K, V, dO, True), 1e-5)


def test_expanded_tensors():
    """Strides of 0: one key head for all, and the gradient that `sum` sends back."""
    Q, K, V, _ = inputs_of((2, 3, 40, 16), 50)
    K = K[:, :1].expand(K.shape)
    dO = torch.ones((), device=DEVICE).expand(Q.shape)
    expected = expected_results(Q, K, V, dO, True)
    assert_errors_within(results(attend, Q, K, V, dO, True), expected, 1e-5)
    leaves = [tensor.detach().requires_grad_() for tensor in (Q, K, V)]
    attend(*leaves, True).sum().backward()
    for leaf, name in zip(leaves, ("dQ", "dK", "dV")):
        assert relative_error(leaf.grad, expected[name]) <= 1e-5


@pytest.mark.parametrize("is_causal", [False, True])
def test_without_keys_queries_or_batch(is_causal):
    ours = results(attend, *inputs_of((2, 17, 16), 0), is_causal)
    assert not ours["O"].any()
    assert (ours["L"] == -torch.inf).all()
    assert not ours["dQ"].any()
    ours = results(attend, *inputs_of((2, 0, 16), 17), is_causal)
    assert not ours["dK"].any()
    assert not ours["dV"].any()
    assert results(attend, *inputs_of((0, 17, 16), 17), is_causal)["O"].shape == (0, 17, 16)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_huge_scores(dtype, is_causal):
    Q, K, V, dO = inputs_of((1, 100, 16), 100, dtype)
    Q, K = 100 * Q, 100 * K
    ours = results(attend, Q, K, V, dO, is_causal)
    assert ours["L"].abs().max() > 1e4
    assert all(torch.isfinite(tensor).all() for tensor in ours.values())
    O, L = plain_attention(Q, K, V, is_causal)
    assert relative_error(ours["O"], O) <= 1e-2
    assert relative_error(ours["L"], L) <= 1e-5


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("lengths", [(17, 40), (40, 17)])
def test_nothing_is_left_unwritten(lengths, is_causal, poison_new_tensors):
    """Keys that no query sees get a gradient of 0, not what was in memory before."""
    inputs = inputs_of((2, lengths[0], 16), lengths[1])
    expected = results(attend, *inputs, is_causal)
    poison_new_tensors()
    ours = results(attend, *inputs, is_causal)
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_what_is_saved():
    Q, K, V, _ = (tensor.requires_grad_() for tensor in inputs_of((3, 20, 16), 30))
    L = saved_logsumexp(attend(Q, K, V))
    assert L.dtype == torch.float32
    assert relative_error(L, plain_attention(Q, K, V)[1]) <= 1e-6


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 2)])
def test_gradients_of_some_inputs_only(needed):
    inputs = inputs_of((1, 20, 16), 20)
    expected = expected_results(*inputs)
    leaves = [tensor.clone().requires_grad_(index in needed) for index, tensor in enumerate(inputs[:3])]
    attend(*leaves).backward(inputs[3])
    for index, name in enumerate(("dQ", "dK", "dV")):
        assert (leaves[index].grad is not None) == (index in needed)
        if index in needed:
            assert relative_error(leaves[index].grad, expected[name]) <= 1e-5


def test_without_gradients():
    Q, K, V, _ = inputs_of((1, 20, 16), 20)
    O = attend(Q, K, V)
    assert not O.requires_grad
    assert relative_error(O, plain_attention(Q, K, V)[0]) <= 1e-5


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 2), (3, 1)])
def test_grouped_queries_share_a_key_head(heads, kv_heads, is_causal):
    """Query head h uses key head h // group, which is what `repeat_interleave` lays out."""
    q, dO = inputs_of((2, heads, 20, 16), 1, seed=0)[0], inputs_of((2, heads, 20, 16), 1, seed=1)[0]
    k, v = inputs_of((2, kv_heads, 20, 16), 1, seed=2)[0], inputs_of((2, kv_heads, 20, 16), 1, seed=3)[0]
    ours = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
    theirs = [tensor.detach().double().requires_grad_() for tensor in (q, k, v)]
    O = flash_attention(*ours, is_causal=is_causal)
    repeated = [tensor.repeat_interleave(heads // kv_heads, dim=1) for tensor in theirs[1:]]
    expected, _ = plain_attention(theirs[0], *repeated, is_causal)
    assert O.shape == q.shape
    assert relative_error(O, expected) <= 1e-5
    gradients = torch.autograd.grad(O, ours, dO), torch.autograd.grad(expected, theirs, dO.double())
    for gradient, expected_gradient in zip(*gradients):
        assert relative_error(gradient, expected_gradient) <= 1e-5


def test_flash_attention_is_causal_by_default_and_needs_no_batch():
    q, k, v, _ = inputs_of((4, 20, 16), 20)
    assert relative_error(flash_attention(q, k, v), plain_attention(q, k, v, True)[0]) <= 1e-5
    expected, _ = plain_attention(q, k[:2].repeat_interleave(2, dim=0), v[:2].repeat_interleave(2, dim=0), True)
    assert relative_error(flash_attention(q, k[:2], v[:2]), expected) <= 1e-5


def test_heads_that_do_not_divide_are_refused():
    q, k, v, _ = inputs_of((1, 6, 20, 16), 20)
    with pytest.raises(ValueError, match=r"6.*4|4.*6"):
        flash_attention(q, k[:, :4], v[:, :4])
    with pytest.raises(ValueError, match=r"3.*2|2.*3"):
        attend(q, k[:, :3], v[:, :2])


def shaped(*shape, **kwargs):
    return torch.zeros(shape, device=DEVICE, **kwargs)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((shaped(3, 200), shaped(3, 200), shaped(3, 200)), r"200"),
        ((shaped(3, 16).double(), shaped(3, 16).double(), shaped(3, 16).double()), "float64"),
        ((shaped(3, 16), shaped(3, 16).half(), shaped(3, 16)), r"float16"),
        ((shaped(3, 16), shaped(3, 16), shaped(3, 32)), r"16.*32"),
        ((shaped(3, 16), shaped(5, 16), shaped(4, 16)), r"5.*4"),
        ((shaped(2, 3, 16), shaped(1, 3, 16), shaped(2, 3, 16)), r"\(2,\).*\(1,\)"),
        ((shaped(16), shaped(3, 16), shaped(3, 16)), r"\(16,\)"),
    ],
)
def test_wrong_inputs_are_named(inputs, message):
    with pytest.raises(ValueError, match=message):
        attend(*inputs)


def test_a_cpu_without_the_interpreter_is_refused(monkeypatch):
    monkeypatch.setattr(triton_support, "INTERPRETED", False)
    with pytest.raises(ValueError, match="use FlashAttentionPyTorch"):
        attend(*random_inputs((1, 16, 16), 16)[:3])


def test_grouped_heads_of_another_batch_are_named():
    with pytest.raises(ValueError, match=r"\(2, 6\).*\(3, 2\)"):
        attend(shaped(2, 6, 5, 16), shaped(3, 2, 5, 16), shaped(3, 2, 5, 16))


def test_second_derivatives_are_refused():
    Q, K, V, dO = inputs_of((2, 20, 16), 20)
    leaves = [tensor.detach().requires_grad_() for tensor in (Q, K, V)]
    O = attend(*leaves)
    gradients = torch.autograd.grad(O, leaves, dO, create_graph=True)
    with pytest.raises(RuntimeError):  # also with a dO that does not depend on Q
        (gradients[0].square().sum() + O.sum()).backward()


def test_memory_layouts():
    """Three dimensions come back contiguous, four as [batch sequence heads d], whose heads join without a copy."""
    Q, K, V, dO = inputs_of((2, 3, 20, 16), 20)
    leaves = [tensor.detach().requires_grad_() for tensor in (Q, K, V)]
    O = attend(*leaves)
    for tensor in (O, *torch.autograd.grad(O, leaves, dO)):
        tensor.transpose(1, 2).view(2, 20, 3 * 16)
    assert attend(Q[0], K[0], V[0]).is_contiguous()


def test_checkpointed():
    inputs = inputs_of((2, 20, 16), 20)
    checkpointed = partial(torch.utils.checkpoint.checkpoint, attend, use_reentrant=False)
    expected = expected_results(*inputs, True)
    leaves = [tensor.detach().requires_grad_() for tensor in inputs[:3]]
    gradients = torch.autograd.grad(checkpointed(*leaves, True), leaves, inputs[3])
    for name, gradient in zip(("dQ", "dK", "dV"), gradients):
        assert relative_error(gradient, expected[name]) <= 1e-5


def test_autocast_casts_as_torch_attention_does():
    q, k, v, _ = inputs_of((2, 3, 20, 16), 20)
    with torch.autocast(DEVICE, torch.float16):
        O = flash_attention(q, k.half(), v)
    assert O.dtype == torch.float16
    assert relative_error(O, plain_attention(q, k, v, True)[0]) <= 2e-3


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU multiplies bfloat16 rightly")
def test_bfloat16_is_refused_in_the_interpreter():
    with pytest.raises(ValueError, match="bfloat16"):
        attend(*(tensor.bfloat16() for tensor in inputs_of((2, 20, 16), 20)[:3]))


def test_precision():
    """Of the products; the interpreter computes all of them in full."""
    before = torch.get_float32_matmul_precision()
    try:
        for asked, expected in (("highest", "tf32x3"), ("high", "tf32")):
            torch.set_float32_matmul_precision(asked)
            assert triton_ops.precision_of(torch.float32) == expected
            first, *smaller = triton_ops.tiles_for("dq", 64, torch.float32)
            assert all(tiles.block_m * tiles.block_n < first.block_m * first.block_n for tiles in smaller)
            assert triton_ops.precision_of(torch.float16) == triton_ops.precision_of(torch.bfloat16) == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)


def test_smaller_tiles_where_the_best_do_not_fit(monkeypatch):
    """What did not fit is remembered for what it was compiled for, and for nothing else."""
    tried = []

    def launch(tiles, *arguments):
        tried.append(tiles)
        if arguments[-2] and tiles == first:  # causal
            raise OutOfResources(2, 1, "shared memory")
        return launch_forward(tiles, *arguments)

    first, second, *_ = triton_ops.tiles_for("forward", 16, torch.float32)
    launch_forward = triton_ops.launch_forward
    monkeypatch.setattr(triton_ops, "launch_forward", launch)
    monkeypatch.setattr(triton_ops, "_too_large", set())
    Q, K, V, _ = inputs_of((2, 20, 16), 20)
    for is_causal in (True, True, False):
        assert relative_error(attend(Q, K, V, is_causal), plain_attention(Q, K, V, is_causal)[0]) <= 1e-5
    assert tried == [first, second, second, first]
    monkeypatch.setattr(triton_ops, "tiles_for", lambda *_: (first,))
    with pytest.raises(RuntimeError, match="fits"):
        attend(Q, K, V, True)


@pytest.mark.parametrize("function", ["FlashAttentionTriton", "FlashAttentionPyTorch"])
def test_compiled_with_dynamic_shapes(function):
    """Shapes of one rank, sequence = d among them, where sizes are easily mistaken.

    In a process of its own: here the package's functions are wrapped in type checks, which break the graph.
    """
    program = f"""
import torch
from cs336_systems.kernels.flash_attention import {function} as function

torch.manual_seed(0)
compiled = torch.compile(function.apply, backend="aot_eager", fullgraph=True, dynamic=True)
for shape in ((2, 3, 20, 16), (1, 2, 16, 16), (3, 1, 7, 20)):
    inputs = [torch.randn(shape, device="{DEVICE}", requires_grad=True) for _ in range(3)]
    ours, theirs = (torch.autograd.grad(f(*inputs, True).sum(), inputs) for f in (compiled, function.apply))
    for one, other in zip(ours, theirs):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
