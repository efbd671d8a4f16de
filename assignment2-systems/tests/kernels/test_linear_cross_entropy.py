"""The fused head and loss against PyTorch's own operators in float64."""

import inspect

import pytest
import torch
from torch.nn import functional as F

from cs336_basics.model import Linear
from cs336_basics.nn_utils import cross_entropy
from cs336_systems.kernels import linear_cross_entropy as module
from cs336_systems.kernels import triton_support
from cs336_systems.kernels.linear_cross_entropy import (
    default_chunk_tokens,
    linear_cross_entropy,
    linear_cross_entropy_reference,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
#: The largest error of a gradient, as a share of its largest entry.
TOLERANCES = {torch.float32: 2e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def inputs(batch, d_model, vocab, dtype, seed=0):
    rng = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*batch, d_model, generator=rng).to(DEVICE, dtype).requires_grad_()
    weight = (torch.randn(vocab, d_model, generator=rng) / d_model**0.5).to(DEVICE, dtype).requires_grad_()
    return hidden, weight, torch.randint(vocab, batch, generator=rng).to(DEVICE)


def by_pytorch(hidden, weight, targets, factor, dtype=torch.float64):
    """Loss and gradients by PyTorch's operators."""
    hidden, weight = (tensor.detach().to(dtype).requires_grad_() for tensor in (hidden, weight))
    loss = F.cross_entropy((hidden @ weight.T).flatten(0, -2), targets.flatten())
    return loss, torch.autograd.grad(loss * factor, (hidden, weight))


def assert_right(hidden, weight, targets, chunk_tokens, factor=3.0, tolerance=None):
    loss = linear_cross_entropy(hidden, weight, targets, chunk_tokens)
    gradients = torch.autograd.grad(loss * factor, (hidden, weight))
    expected, expected_gradients = by_pytorch(hidden, weight, targets, factor)
    tolerance = tolerance or TOLERANCES[hidden.dtype]
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=tolerance)
    # A sum over a large vocabulary rounds as this machine's matmul does: PyTorch's float32 is the measure then.
    _, usual = by_pytorch(hidden, weight, targets, factor, torch.float32)
    for parameter, one, other, by_float32 in zip((hidden, weight), gradients, expected_gradients, usual):
        assert one.dtype == parameter.dtype
        allowed = max(tolerance * other.abs().max().item(), 2 * (by_float32.double() - other).abs().max().item())
        torch.testing.assert_close(one.double(), other, rtol=0, atol=allowed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("batch", "d_model", "vocab", "chunk_tokens"),
    [
        ((1, 1), 1, 1, None),
        ((1, 2), 8, 2, 1),
        ((3, 7), 16, 17, 4),
        ((3, 7), 16, 64, 21),
        ((33,), 5, 129, 32),
        ((2, 2, 2), 8, 10_000, 3),
        ((5, 1), 4, 50_257, 2),
    ],
)
def test_loss_and_gradients_equal_float64(batch, d_model, vocab, chunk_tokens, dtype):
    assert_right(*inputs(batch, d_model, vocab, dtype), chunk_tokens)


@pytest.mark.parametrize("seed", range(3))
def test_chunks_do_not_matter(seed):
    tensors = inputs((2, 4), 12, 33, torch.float32, seed)
    whole = linear_cross_entropy(*tensors)
    for chunk_tokens in (1, 5, 7):
        torch.testing.assert_close(linear_cross_entropy(*tensors, chunk_tokens), whole, rtol=1e-6, atol=0)
        assert_right(*tensors, chunk_tokens)


def test_default_chunks_bound_the_logits():
    assert default_chunk_tokens(17) * 17 <= module.CHUNK_LOGITS
    assert default_chunk_tokens(50_257) == 2560
    assert default_chunk_tokens(10_000_000) == module.CHUNK_TOKENS_AT_LEAST


def test_reference_is_the_head_and_the_loss_of_assignment_1():
    hidden, weight, targets = inputs((2, 3), 4, 7, torch.float32)
    head = Linear(4, 7, device=DEVICE)
    head.load_state_dict({"weight": weight.detach()})
    expected = cross_entropy(head(hidden), targets)
    assert torch.equal(linear_cross_entropy_reference(hidden, weight, targets), expected)


@pytest.mark.parametrize("targets", [[0, 1], [1, 0]])
def test_huge_logits(targets):
    hidden = torch.tensor([[1e4, 0.0], [0.0, 1e4]], device=DEVICE, requires_grad=True)
    weight = torch.eye(2, device=DEVICE).requires_grad_()
    assert_right(hidden, weight, torch.tensor(targets, device=DEVICE), None)
    loss = linear_cross_entropy(hidden, weight, torch.tensor(targets, device=DEVICE))
    assert loss == (0 if targets == [0, 1] else 1e4)


def test_float16_keeps_small_gradients():
    """1/tokens of a small probability is not a float16; the loss scale comes in only after it would be lost."""
    hidden, weight, targets = inputs((90,), 8, 700, torch.float16)
    assert_right(hidden, weight, targets, None, factor=2.0**16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("hidden_dtype", [torch.float32, None])
def test_autocast_is_that_of_the_head(dtype, hidden_dtype):
    hidden, weight, targets = inputs((3, 7), 16, 50, torch.float32)
    hidden = hidden.detach().to(hidden_dtype or dtype).requires_grad_()
    with torch.autocast(DEVICE, dtype):
        losses = (
            linear_cross_entropy(hidden, weight, targets, 8),
            linear_cross_entropy_reference(hidden, weight, targets),
        )
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-4)
    ours, theirs = (torch.autograd.grad(loss, (hidden, weight)) for loss in losses)
    for one, other in zip(ours, theirs):
        assert one.dtype == other.dtype
        atol = 2 * TOLERANCES[dtype] * other.abs().max().item()
        torch.testing.assert_close(one, other, rtol=0, atol=atol)


def test_only_the_gradients_that_are_needed():
    hidden, weight, targets = inputs((3,), 4, 17, torch.float32)
    expected = linear_cross_entropy(hidden, weight, targets)
    both = torch.autograd.grad(expected, (hidden, weight))
    for tensors, needed in (((hidden, weight.detach()), 0), ((hidden.detach(), weight), 1)):
        loss = linear_cross_entropy(*tensors, targets)
        torch.testing.assert_close(torch.autograd.grad(loss, tensors[needed])[0], both[needed])
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, targets)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-6, atol=0)


def test_the_backward_pass_can_be_repeated():
    hidden, weight, targets = inputs((3,), 4, 17, torch.float32)
    loss = linear_cross_entropy(hidden, weight, targets)
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(loss, (hidden, weight))
    assert all(torch.equal(one, other) for one, other in zip(first, second))


def test_second_derivatives_are_refused():
    hidden = torch.randn(3, 4, device=DEVICE, requires_grad=True)
    loss = linear_cross_entropy(
        hidden, torch.randn(5, 4, device=DEVICE), torch.zeros(3, dtype=torch.long, device=DEVICE)
    )
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(loss, hidden, create_graph=True)


def test_a_target_outside_the_vocabulary_is_seen():
    hidden, weight, _ = inputs((3,), 4, 17, torch.float32)
    for target in (-1, 17, 31, 2**40):
        assert linear_cross_entropy(hidden, weight, torch.tensor([0, target, 1], device=DEVICE)).isnan()


def test_no_tokens():
    hidden, weight, targets = inputs((0,), 4, 17, torch.float32)
    loss = linear_cross_entropy(hidden, weight, targets)
    loss.backward()
    assert loss.isnan()
    assert hidden.grad.shape == (0, 4)


def test_operator_is_registered_as_pytorch_wants_it():
    hidden, weight, targets = inputs((5,), 4, 17, torch.float32)
    for gradients in ((True, True), (False, True), (False, False)):
        torch.library.opcheck(module._loss_and_gradients, (hidden, weight, targets, 3, torch.float32, *gradients))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(17, 5)}, "hidden is .* must be"),
        ({"targets": torch.zeros(4, dtype=torch.long)}, "one token id"),
        ({"targets": torch.zeros(3)}, "one token id"),
        ({"hidden": torch.zeros(3, 4, dtype=torch.float64)}, "linear_cross_entropy_reference"),
        ({"hidden": torch.zeros(3, 4, dtype=torch.float16)}, "torch.autocast"),
        ({"chunk_tokens": 0}, "chunk_tokens is 0"),
        ({"weight": torch.zeros(17, 4, device="meta")}, "one device"),
    ],
)
def test_wrong_inputs_are_refused(change, message):
    good = {
        "hidden": torch.zeros(3, 4), "weight": torch.zeros(17, 4), "targets": torch.zeros(3, dtype=torch.long),
        "chunk_tokens": None,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        module._check_inputs(**(good | change))


def test_a_cpu_without_the_interpreter_is_refused(monkeypatch):
    monkeypatch.setattr(triton_support, "INTERPRETED", False)
    hidden, weight, targets = (tensor.cpu() for tensor in inputs((3,), 4, 17, torch.float32))
    with pytest.raises(ValueError, match="call linear_cross_entropy_reference"):
        linear_cross_entropy(hidden, weight, targets)


def assert_compiles(monkeypatch, backend):
    # Without the checks of shapes that are active in tests: torch.compile does not trace them.
    for name, function in inspect.getmembers(module, inspect.isfunction):
        monkeypatch.setattr(module, name, inspect.unwrap(function))

    def head(hidden, weight, targets):
        with torch.autocast(DEVICE, torch.bfloat16):
            return 2 * module.linear_cross_entropy(hidden.sin(), weight, targets, 8)

    tensors = inputs((2, 9), 8, 33, torch.float32)
    results = []
    for function in (head, torch.compile(head, backend=backend, fullgraph=True)):
        loss = function(*tensors)
        results.append((loss, *torch.autograd.grad(loss, tensors[:2])))
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-3)


def test_compiles_into_one_graph(monkeypatch):
    assert_compiles(monkeypatch, "aot_eager")


@pytest.mark.gpu
def test_compiles_into_one_graph_by_inductor(monkeypatch):
    assert_compiles(monkeypatch, "inductor")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [10_000, 50_257])
@pytest.mark.parametrize("chunk_tokens", [None, 300])
def test_large_shapes(vocab, dtype, chunk_tokens):
    assert_right(*inputs((3, 345), 256, vocab, dtype), chunk_tokens, tolerance=1e-5 if dtype == torch.float32 else None)


@pytest.mark.gpu
def test_memory_is_bounded_and_results_are_repeatable():
    hidden, weight, targets = inputs((16_384,), 64, 50_257, torch.bfloat16)
    results = []
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss = linear_cross_entropy(hidden, weight, targets, 1024)
        results.append((loss, *torch.autograd.grad(loss, (hidden, weight))))
        assert torch.cuda.max_memory_allocated() - before < 16_384 * 50_257 * 2 / 4  # of bfloat16 logits
    assert all(torch.equal(one, other) for one, other in zip(*results))
