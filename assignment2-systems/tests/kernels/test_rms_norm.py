"""The fused RMSNorm against PyTorch's own in float64."""

import inspect

import pytest
import torch
from torch.nn import functional as F

from cs336_basics.model import RMSNorm
from cs336_systems.kernels import rms_norm as module
from cs336_systems.kernels import triton_support
from cs336_systems.kernels.rms_norm import MAX_WIDTH, FusedRMSNorm, rms_norm, rms_norm_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
#: The largest error, as a share of the largest entry, or of 0.1 if that is more: the gradient of a row of one
#: number, which is ±1 whatever x, is what is left of two equal terms.
TOLERANCES = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def inputs(shape, dtype, weight_dtype, seed=0):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=rng).to(DEVICE, dtype).requires_grad_()
    weight = torch.rand(shape[-1], generator=rng).add(0.5).to(DEVICE, weight_dtype).requires_grad_()
    return x, weight, torch.randn(shape, generator=rng).to(DEVICE, dtype)


def assert_close(one, other, dtype):
    assert one.dtype == dtype
    atol = TOLERANCES[dtype] * max(other.abs().max().item(), 0.1) if other.numel() else 0
    torch.testing.assert_close(one.double(), other, rtol=0, atol=atol)


def assert_right(x, weight, dy, eps=1e-5):
    y = rms_norm(x, weight, eps)
    gradients = torch.autograd.grad(y, (x, weight), dy)
    x64, weight64 = (tensor.detach().double().requires_grad_() for tensor in (x, weight))
    expected = F.rms_norm(x64, x.shape[-1:], weight64, eps)
    assert_close(y, expected, x.dtype)
    for parameter, one, other in zip(
        (x, weight), gradients, torch.autograd.grad(expected, (x64, weight64), dy.double())
    ):
        assert_close(one, other, parameter.dtype)


@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.float32), (torch.float16, torch.float32), (torch.float16,) * 2]
)
@pytest.mark.parametrize("shape", [(1, 1), (5,), (3, 7), (2, 3, 17), (1, 2, 3, 129), (0, 8), (9, 1024), (5, 1600)])
def test_output_and_gradients_equal_float64(shape, dtypes):
    assert_right(*inputs(shape, *dtypes))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("eps", [1e-6, 1e-5, 0.1])
def test_seeds_and_eps(seed, eps):
    assert_right(*inputs((11, 33), torch.float32, torch.float32, seed), eps)


def test_bfloat16():
    assert_right(*inputs((7, 50), torch.bfloat16, torch.float32))


def test_reference_is_the_norm_of_assignment_1():
    x, weight, _ = inputs((3, 17), torch.float16, torch.float32)
    norm = RMSNorm(17, eps=1e-3, device=DEVICE)
    norm.load_state_dict({"weight": weight.detach()})
    assert torch.equal(rms_norm_reference(x, weight, 1e-3), norm(x))


def test_squares_beyond_float16():
    x = torch.full((1, 64), 300.0, dtype=torch.float16, device=DEVICE)
    y = FusedRMSNorm(64, device=DEVICE, dtype=torch.float16)(x)
    assert y.dtype == torch.float16
    torch.testing.assert_close(y, torch.ones_like(x))


def test_rows_of_zeros_are_finite():
    x = torch.zeros(2, 8, device=DEVICE, requires_grad=True)
    y = rms_norm(x, torch.ones(8, device=DEVICE), 1e-5)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert (y == 0).all()
    assert gradient.isfinite().all()


def test_strided_inputs_and_gradients():
    wide, weight, dy = inputs((4, 6, 10), torch.float32, torch.float32)
    x = wide.detach().transpose(0, 1).requires_grad_()
    assert_right(x, weight, dy.transpose(0, 1))
    assert_right(x, weight, dy[:1, :1].expand(6, 4, 10))


def test_same_bits_every_time():
    tensors = inputs((37, 100), torch.float32, torch.float32)
    x, weight, dy = tensors
    first, second = (torch.autograd.grad(rms_norm(x, weight), (x, weight), dy) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second))


def test_module_stands_in_for_assignment_1s():
    ours, theirs = FusedRMSNorm(24, eps=1e-3, device=DEVICE), RMSNorm(24, eps=1e-3, device=DEVICE)
    with torch.no_grad():
        theirs.weight.uniform_(0.5, 1.5)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 5, 24, device=DEVICE)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-6, atol=1e-6)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert ours(x).dtype == theirs(x).dtype == torch.float32


def test_second_derivatives_are_refused():
    x, weight, dy = inputs((3, 8), torch.float32, torch.float32)
    (gradient,) = torch.autograd.grad(rms_norm(x, weight), x, dy, create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.sum().backward()


def test_operators_are_registered_as_pytorch_wants_them():
    x, weight, dy = inputs((3, 8), torch.float32, torch.float32)
    torch.library.opcheck(module._forward, (x, weight, 1e-5))
    detached = (dy, x.detach(), weight.detach(), torch.rand(3, device=DEVICE))
    torch.library.opcheck(module._backward, detached)


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(4), "must be"),
        (torch.zeros(()), torch.zeros(1), "must be"),
        (torch.zeros(2, 3), torch.zeros(3, 1), "must be"),
        (torch.zeros(1, MAX_WIDTH + 1), torch.zeros(MAX_WIDTH + 1), "rms_norm_reference"),
        (torch.zeros(2, 0), torch.zeros(0), "rms_norm_reference"),
        (torch.zeros(2, 3, dtype=torch.float64), torch.zeros(3), "cs336_basics.model.RMSNorm"),
        (torch.zeros(2, 3), torch.zeros(3, device="meta"), "one device"),
    ],
)
def test_wrong_inputs_are_refused(x, weight, message):
    with pytest.raises(ValueError, match=message):
        module._check_inputs(x, weight)


def test_a_cpu_without_the_interpreter_is_refused(monkeypatch):
    monkeypatch.setattr(triton_support, "INTERPRETED", False)
    with pytest.raises(ValueError, match="call rms_norm_reference"):
        rms_norm(torch.zeros(2, 3), torch.zeros(3))


def assert_compiles(monkeypatch, backend):
    # Without the checks of shapes that are active in tests: torch.compile does not trace them.
    for name, function in inspect.getmembers(module, inspect.isfunction):
        monkeypatch.setattr(module, name, inspect.unwrap(function))
    monkeypatch.setattr(FusedRMSNorm, "forward", inspect.unwrap(FusedRMSNorm.forward))
    norm = FusedRMSNorm(24, device=DEVICE)
    x = torch.randn(3, 5, 24, device=DEVICE, requires_grad=True)

    def function(x):
        return norm(2 * x).sin()

    results = []
    for candidate in (function, torch.compile(function, backend=backend, fullgraph=True)):
        y = candidate(x)
        results.append((y, *torch.autograd.grad(y.sum(), (x, norm.weight))))
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_compiles_into_one_graph(monkeypatch):
    assert_compiles(monkeypatch, "aot_eager")


@pytest.mark.gpu
def test_compiles_into_one_graph_by_inductor(monkeypatch):
    assert_compiles(monkeypatch, "inductor")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 345, 768), (1000, 1600), (8192, 1024), (333, 4096), (50, 8191), (20, MAX_WIDTH)])
def test_large_shapes(shape, dtype):
    x, weight, dy = inputs(shape, dtype, torch.float32)
    y = rms_norm(x, weight)
    dx, dw = torch.autograd.grad(y, (x, weight), dy)
    x64, weight64 = (tensor.detach().double().requires_grad_() for tensor in (x, weight))
    expected = F.rms_norm(x64, shape[-1:], weight64, 1e-5)
    expected_dx, expected_dw = torch.autograd.grad(expected, (x64, weight64), dy.double())
    assert_close(y, expected, dtype)
    assert_close(dx, expected_dx, dtype)
    torch.testing.assert_close(dw.double(), expected_dw, rtol=1e-4, atol=1e-4 * expected_dw.abs().max().item())
    assert torch.equal(torch.autograd.grad(rms_norm(x, weight), weight, dy)[0], dw)
