"""Attention by its formula in float64, and how far from it an implementation is."""

import math

import torch


def plain_attention(Q, K, V, is_causal=False):
    """(O, L) in float64: softmax(Q Kᵀ / √d) V and the log-sum-exp of the scores; differentiable."""
    Q, K, V = Q.double(), K.double(), V.double()
    scores = Q @ K.mT / math.sqrt(Q.shape[-1])
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=Q.device).tril()
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(dim=-1) @ V, scores.logsumexp(dim=-1)


def random_inputs(shape, n_keys, *, dtype=torch.float32, device="cpu", seed=0):
    """(Q, K, V, dO) of unit variance; `shape` is Q's. Drawn on the CPU, so that they are the same everywhere."""
    rng = torch.Generator().manual_seed(seed)
    *leading, n_queries, d = shape
    lengths = (n_queries, n_keys, n_keys, n_queries)
    return tuple(torch.randn(*leading, n, d, generator=rng).to(device, dtype) for n in lengths)


def expected_results(Q, K, V, dO, is_causal=False):
    """{"O", "L", "dQ", "dK", "dV"} of `plain_attention`, in float64."""
    leaves = [tensor.detach().double().requires_grad_() for tensor in (Q, K, V)]
    O, L = plain_attention(*leaves, is_causal)
    gradients = torch.autograd.grad(O, leaves, dO.double())
    return dict(zip(("O", "L", "dQ", "dK", "dV"), (O.detach(), L.detach(), *gradients)))


def results(apply, Q, K, V, dO, is_causal=False):
    """The same of an autograd function's `apply`; L is taken from what it saved."""
    leaves = [tensor.detach().requires_grad_() for tensor in (Q, K, V)]
    O = apply(*leaves, is_causal)
    L = saved_logsumexp(O)
    gradients = torch.autograd.grad(O, leaves, dO)
    for gradient, leaf in zip(gradients, leaves):
        assert gradient.shape == leaf.shape
        assert gradient.dtype == leaf.dtype
    assert O.shape == Q.shape
    assert O.dtype == Q.dtype
    return dict(zip(("O", "L", "dQ", "dK", "dV"), (O.detach(), L, *gradients)))


def saved_logsumexp(O):
    """The one saved tensor of shape [... n_queries], which is how the course's tests find L."""
    found = [tensor for tensor in O.grad_fn.saved_tensors if tensor.shape == O.shape[:-1]]
    assert len(found) == 1, f"{len(found)} saved tensors of shape {tuple(O.shape[:-1])}"
    return found[0]


def relative_error(x, reference):
    """‖x - reference‖ / ‖reference‖ in float64; fails if x is not finite.

    Where the reference vanishes, ‖x‖ per element. The gradients of Q and K do so where a query sees one key:
    its softmax is 1, whatever the score.
    """
    assert x.shape == reference.shape, f"shape {tuple(x.shape)}, expected {tuple(reference.shape)}"
    assert torch.isfinite(x).all(), f"{(~torch.isfinite(x)).sum().item()} of {x.numel()} entries are not finite"
    x, reference = x.double(), reference.double()
    norm, unit = reference.norm().item(), math.sqrt(max(1, x.numel()))
    return (x - reference).norm().item() / (norm if norm > 1e-12 * unit else unit)


def relative_errors(ours, expected):
    """`relative_error` of each result."""
    return {name: relative_error(ours[name], expected[name]) for name in expected}


def assert_errors_within(ours, expected, bound):
    errors = relative_errors(ours, expected)
    assert max(errors.values()) <= bound, f"relative errors {errors} exceed {bound}"
